"""Configs and schedules of pruning."""

from graphopt import moved
from graphopt.config.pruning import (
    MagnitudePrunerConfig,
    ModuleMagnitudePrunerConfig,
    OpMagnitudePrunerConfig,
)
from graphopt.specs.pruning import (
    ConstantSparsitySchedule,
    PolynomialDecaySchedule,
    SparsitySchedule,
    SparsityScheduleBase,
)

__all__ = [
    "ConstantSparsitySchedule",
    "MagnitudePrunerConfig",
    "ModuleMagnitudePrunerConfig",
    "OpMagnitudePrunerConfig",
    "PolynomialDecaySchedule",
    "SparsitySchedule",
    "SparsityScheduleBase",
]

moved.provide(__name__)
