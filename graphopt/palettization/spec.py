"""Specs of palettization under coreai-opt's module path."""

from graphopt import moved
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

moved.provide(__name__)
