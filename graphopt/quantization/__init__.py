"""Quantization: the compressor class, its configs and specs."""

from graphopt import moved
from graphopt.loading import uncollected

with uncollected():
    from graphopt.compressors.quantizer import Quantizer
    from graphopt.config.quantization import (
        ExecutionMode,
        KVCacheQuantConfig,
        ModuleQuantizerConfig,
        OpQuantizerConfig,
        QATSchedule,
        QuantizerConfig,
    )
    from graphopt.errors import InvalidExecutionModeError
    from graphopt.passes.calibrate_activations import CalibrateActivations
    from graphopt.specs import QuantizationFormulation, QuantizationScheme, QuantizationSpec

__all__ = [
    "CalibrateActivations",
    "ExecutionMode",
    "InvalidExecutionModeError",
    "KVCacheQuantConfig",
    "ModuleQuantizerConfig",
    "OpQuantizerConfig",
    "QATSchedule",
    "QuantizationFormulation",
    "QuantizationScheme",
    "QuantizationSpec",
    "Quantizer",
    "QuantizerConfig",
]

moved.provide(__name__)
