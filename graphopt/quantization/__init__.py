"""Quantization: specs and configs."""

from graphopt.config.quantization import ExecutionMode, ModuleQuantizerConfig, QuantizerConfig
from graphopt.specs import QuantizationScheme, QuantizationSpec

__all__ = [
    "ExecutionMode",
    "ModuleQuantizerConfig",
    "QuantizationScheme",
    "QuantizationSpec",
    "QuantizerConfig",
]
