"""Palettization of weights: table lookups instead of floats."""

from graphopt.config.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    OpKMeansPalettizerConfig,
)
from graphopt.palettization.kmeans import KMeansPalettizer
from graphopt.specs import PalettizationSpec

__all__ = [
    "KMeansPalettizer",
    "KMeansPalettizerConfig",
    "ModuleKMeansPalettizerConfig",
    "OpKMeansPalettizerConfig",
    "PalettizationSpec",
]
