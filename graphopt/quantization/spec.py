"""Specs of quantization under coreai-opt's module path."""

from graphopt.config.quantization import (
    default_activation_quantization_spec,
    default_weight_quantization_spec,
)
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
    "QuantizationFormulation",
    "QuantizationGranularity",
    "QuantizationScheme",
    "QuantizationSpec",
    "default_activation_quantization_spec",
    "default_weight_quantization_spec",
]
