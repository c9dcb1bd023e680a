"""Compress the weights of a Core ML model that is already built."""

from graphopt.interop.coreml_utils.passes import (
    WeightInfo,
    palettize_weights,
    quantize_weights,
    weights_of,
)

__all__ = ["WeightInfo", "palettize_weights", "quantize_weights", "weights_of"]
