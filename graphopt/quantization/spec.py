"""Specs of quantization under coreai-opt's module path."""

from graphopt import moved
from graphopt.config.quantization import (
    default_activation_quantization_spec,
    default_weight_quantization_spec,
)
from graphopt.numerics.affine import fp4_forward
from graphopt.observers import QParamsCalculatorBase, RunningRangeMixin
from graphopt.observers.named import (
    DynamicQParamsCalculator,
    GlobalMinMaxQParamsCalculator,
    MovingAverageQParamsCalculator,
    StatefulQParamsCalculatorBase,
    StatelessQParamsCalculatorBase,
    StaticQParamsCalculator,
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
from graphopt.specs.compression import CompressionTargetTensor
from graphopt.specs.granularity import resolve_block_sizes
from graphopt.specs.ranges import MinMaxRangeCalculator, RangeCalculatorBase

__all__ = [
    "CompressionTargetTensor",
    "DynamicQParamsCalculator",
    "GlobalMinMaxQParamsCalculator",
    "MinMaxRangeCalculator",
    "MovingAverageQParamsCalculator",
    "PerBlockGranularity",
    "PerChannelGranularity",
    "PerGroupedChannelGranularity",
    "PerTensorGranularity",
    "QParamsCalculatorBase",
    "QuantizationFormulation",
    "QuantizationGranularity",
    "QuantizationScheme",
    "QuantizationSpec",
    "RangeCalculatorBase",
    "RunningRangeMixin",
    "StatefulQParamsCalculatorBase",
    "StatelessQParamsCalculatorBase",
    "StaticQParamsCalculator",
    "default_activation_quantization_spec",
    "default_weight_quantization_spec",
    "fp4_forward",
    "resolve_block_sizes",
]

moved.provide(__name__)
