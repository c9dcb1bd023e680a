"""Specs of pruning."""

from graphopt import moved
from graphopt.specs.pruning import (
    BlockStructured,
    ChannelStructured,
    NMStructured,
    PruningScheme,
    PruningSpec,
    Unstructured,
    default_weight_pruning_spec,
)

__all__ = [
    "BlockStructured",
    "ChannelStructured",
    "NMStructured",
    "PruningScheme",
    "PruningSpec",
    "Unstructured",
    "default_weight_pruning_spec",
]

moved.provide(__name__)
