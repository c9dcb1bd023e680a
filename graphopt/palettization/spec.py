"""Specs of palettization under coreai-opt's module path."""

from graphopt.specs import (
    DefaultTrainingSpec,
    PalettizationGranularity,
    PalettizationSpec,
    PerGroupedChannelGranularity,
    PerTensorGranularity,
    TrainingStrategySpec,
    default_weight_palettization_spec,
)

__all__ = [
    "DefaultTrainingSpec",
    "PalettizationGranularity",
    "PalettizationSpec",
    "PerGroupedChannelGranularity",
    "PerTensorGranularity",
    "TrainingStrategySpec",
    "default_weight_palettization_spec",
]
