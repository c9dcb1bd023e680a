"""Configs of magnitude pruning, with coreai-opt's fields."""

from __future__ import annotations

from typing import Any, ClassVar

from graphopt.config.base import (
    CompressionConfig,
    ModuleCompressionConfig,
    OpCompressionConfig,
)
from graphopt.config.weight_only import (
    WeightOnlyModuleValidationMixin,
    WeightOnlyOpValidationMixin,
)
from graphopt.specs import PruningSpec
from graphopt.specs.pruning import SparsitySchedule

__all__ = [
    "MagnitudePrunerConfig",
    "ModuleMagnitudePrunerConfig",
    "OpMagnitudePrunerConfig",
]


def _default_slots() -> dict[str, dict[Any, Any]]:
    return {"op_state_spec": {"weight": PruningSpec(), "in_proj_weight": PruningSpec()}}


class OpMagnitudePrunerConfig(WeightOnlyOpValidationMixin, OpCompressionConfig[PruningSpec]):
    """Pruning of one op's state.

    Examples:
        >>> OpMagnitudePrunerConfig().op_state_spec["weight"].target_sparsity
        0.5
    """

    @classmethod
    def default_slots(cls) -> dict[str, dict[Any, Any]]:
        """Half of each weight becomes zero."""
        return _default_slots()


class ModuleMagnitudePrunerConfig(
    WeightOnlyModuleValidationMixin, ModuleCompressionConfig[PruningSpec, OpMagnitudePrunerConfig]
):
    """Pruning of everything inside a module.

    Attributes:
        sparsity_schedule: How sparsity grows in training.

    Examples:
        >>> from graphopt.pruning import PolynomialDecaySchedule
        >>> schedule = PolynomialDecaySchedule(total_iters=100)
        >>> ModuleMagnitudePrunerConfig(sparsity_schedule=schedule).sparsity_schedule.total_iters
        100
    """

    sparsity_schedule: SparsitySchedule | None = None

    @classmethod
    def default_slots(cls) -> dict[str, dict[Any, Any]]:
        """Half of each weight becomes zero."""
        return _default_slots()


class MagnitudePrunerConfig(CompressionConfig[ModuleMagnitudePrunerConfig]):
    """What a magnitude pruner does to a model.

    Examples:
        >>> MagnitudePrunerConfig().global_config.op_state_spec["weight"].target_sparsity
        0.5
    """

    root_key: ClassVar[str] = "magnitude_pruning_config"
    spec_key: ClassVar[str] = "pruning_spec"

    @classmethod
    def default_global_config(cls) -> ModuleMagnitudePrunerConfig:
        """Half of each weight becomes zero."""
        return ModuleMagnitudePrunerConfig()
