"""Palettization of weights: table lookups instead of floats."""

from graphopt import moved
from graphopt.loading import uncollected

with uncollected():
    from graphopt.compressors.dkm import DKMPalettizer
    from graphopt.compressors.kmeans import KMeansPalettizer
    from graphopt.config.palettization import (
        DKMPalettizerConfig,
        KMeansPalettizerConfig,
        ModuleDKMPalettizerConfig,
        ModuleKMeansPalettizerConfig,
        OpDKMPalettizerConfig,
        OpKMeansPalettizerConfig,
    )
    from graphopt.passes.fit_palettes import FitPalettes
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

moved.provide(__name__)
