"""Palettization of weights: table lookups instead of floats."""

from graphopt.config.palettization import (
    DKMPalettizerConfig,
    KMeansPalettizerConfig,
    ModuleDKMPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    OpDKMPalettizerConfig,
    OpKMeansPalettizerConfig,
)
from graphopt.palettization.dkm import DKMPalettizer
from graphopt.palettization.fit_palettes import FitPalettes
from graphopt.palettization.kmeans import KMeansPalettizer
from graphopt.specs import PalettizationSpec

__all__ = [
    "DKMPalettizer",
    "DKMPalettizerConfig",
    "FitPalettes",
    "KMeansPalettizer",
    "KMeansPalettizerConfig",
    "ModuleDKMPalettizerConfig",
    "ModuleKMeansPalettizerConfig",
    "OpDKMPalettizerConfig",
    "OpKMeansPalettizerConfig",
    "PalettizationSpec",
]
