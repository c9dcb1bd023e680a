"""Pruning: weights with zeros, stored as values and masks."""

from graphopt import moved
from graphopt.loading import uncollected

with uncollected():
    from graphopt.compressors.pruner import MagnitudePruner
    from graphopt.config.pruning import (
        MagnitudePrunerConfig,
        ModuleMagnitudePrunerConfig,
        OpMagnitudePrunerConfig,
    )
    from graphopt.specs.pruning import (
        BlockStructured,
        ChannelStructured,
        ConstantSparsitySchedule,
        NMStructured,
        PolynomialDecaySchedule,
        PruningSpec,
        Unstructured,
    )

__all__ = [
    "BlockStructured",
    "ChannelStructured",
    "ConstantSparsitySchedule",
    "MagnitudePruner",
    "MagnitudePrunerConfig",
    "ModuleMagnitudePrunerConfig",
    "NMStructured",
    "OpMagnitudePrunerConfig",
    "PolynomialDecaySchedule",
    "PruningSpec",
    "Unstructured",
]

moved.provide(__name__)
