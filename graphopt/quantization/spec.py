"""Specs of quantization under coreai-opt's module path."""

from graphopt.config.quantization import (
    default_activation_quantization_spec,
    default_weight_quantization_spec,
)
from graphopt.observers import QParamsCalculatorBase, RunningRangeMixin
from graphopt.specs import (
    PerBlockGranularity,
    PerChannelGranularity,
    PerGroupedChannelGranularity,
    PerTensorGranularity,
    QuantizationFormulation,
    QuantizationGranularity,
    QuantizationScheme,
    QuantizationSpec,
)

__all__ = [
    "PerBlockGranularity",
    "PerChannelGranularity",
    "PerGroupedChannelGranularity",
    "PerTensorGranularity",
    "QParamsCalculatorBase",
    "QuantizationFormulation",
    "QuantizationGranularity",
    "QuantizationScheme",
    "QuantizationSpec",
    "RunningRangeMixin",
    "default_activation_quantization_spec",
    "default_weight_quantization_spec",
]
