"""How much the loss cares about each weight, from gradients of a model in its uncompressed form."""

from graphopt.fitting.sensitivity.collector import GradientCollector, GradientTap, WeightTap
from graphopt.fitting.sensitivity.losses import LossFn, label_free_loss
from graphopt.fitting.sensitivity.storage import load_sensitivities, save_sensitivities

__all__ = [
    "GradientCollector",
    "GradientTap",
    "LossFn",
    "WeightTap",
    "label_free_loss",
    "load_sensitivities",
    "save_sensitivities",
]
