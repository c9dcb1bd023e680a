"""Quantization: the compressor class, its configs and specs."""

from graphopt.config.quantization import (
    ExecutionMode,
    KVCacheQuantConfig,
    ModuleQuantizerConfig,
    OpQuantizerConfig,
    QATSchedule,
    QuantizerConfig,
)
from graphopt.quantization.quantizer import Quantizer
from graphopt.specs import QuantizationFormulation, QuantizationScheme, QuantizationSpec

__all__ = [
    "ExecutionMode",
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
