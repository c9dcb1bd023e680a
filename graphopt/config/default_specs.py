"""What is quantized how where a config says nothing."""

from __future__ import annotations

from typing import Any

from graphopt.config.base import ANY
from graphopt.specs import PerChannelGranularity, QuantizationSpec

__all__ = [
    "default_activation_quantization_spec",
    "default_slots",
    "default_weight_quantization_spec",
]


def default_weight_quantization_spec() -> QuantizationSpec:
    """Symmetric int8, one scale per output channel, from the weights' own range.

    Examples:
        >>> default_weight_quantization_spec().granularity
        PerChannelGranularity(axis=None)
    """
    return QuantizationSpec(granularity=PerChannelGranularity(), qparam_calculator_cls="static")


def default_activation_quantization_spec() -> QuantizationSpec:
    """Symmetric int8, one scale per tensor, from a moving average of ranges.

    Examples:
        >>> default_activation_quantization_spec().qparam_calculator_cls
        'moving_average'
    """
    return QuantizationSpec(qparam_calculator_cls="moving_average")


def default_slots() -> dict[str, dict[Any, Any]]:
    """int8 activations and per-channel int8 weights, by slot."""
    activation = default_activation_quantization_spec()
    return {
        "op_input_spec": {ANY: activation},
        "op_output_spec": {ANY: activation},
        "op_state_spec": {"weight": default_weight_quantization_spec()},
    }
