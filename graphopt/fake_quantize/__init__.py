"""The modules that stand in a prepared graph: they observe, and round as the target will."""

from graphopt.fake_quantize.activation import ActivationQuantizer
from graphopt.fake_quantize.conv_norm import ConvNorm
from graphopt.fake_quantize.norm import TrainableNorm
from graphopt.fake_quantize.origin import QUANTIZERS, Origin
from graphopt.fake_quantize.palette import WeightPalettizer
from graphopt.fake_quantize.pruner import WeightPruner
from graphopt.fake_quantize.weight import WeightQuantizer

__all__ = [
    "QUANTIZERS",
    "ActivationQuantizer",
    "ConvNorm",
    "Origin",
    "TrainableNorm",
    "WeightPalettizer",
    "WeightPruner",
    "WeightQuantizer",
]
