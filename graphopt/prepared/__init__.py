"""The modules that stand in a prepared graph: they observe, and round as the target will."""

from graphopt.prepared.activation import ActivationQuantizer
from graphopt.prepared.conv_norm import ConvNorm
from graphopt.prepared.norm import TrainableNorm
from graphopt.prepared.origin import QUANTIZERS, Origin
from graphopt.prepared.palette import WeightPalettizer
from graphopt.prepared.pruner import WeightPruner
from graphopt.prepared.weight import WeightQuantizer

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
