"""Configs of palettization under coreai-opt's module path."""

from graphopt import moved
from graphopt.config.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    OpKMeansPalettizerConfig,
    PATSchedule,
)
from graphopt.specs.palettization import VectorKMeansConfig

__all__ = [
    "KMeansPalettizerConfig",
    "ModuleKMeansPalettizerConfig",
    "OpKMeansPalettizerConfig",
    "PATSchedule",
    "VectorKMeansConfig",
]

moved.provide(__name__)
