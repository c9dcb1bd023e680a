"""Pruning: specs and configs."""

from graphopt.config.pruning import MagnitudePrunerConfig, ModuleMagnitudePrunerConfig
from graphopt.specs import PruningSpec

__all__ = ["MagnitudePrunerConfig", "ModuleMagnitudePrunerConfig", "PruningSpec"]
