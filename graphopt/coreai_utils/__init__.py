"""Compress the weights of a Core AI program that is already built."""

from graphopt import moved
from graphopt.interop.coreai_utils.common import CompressionGranularity, DType, QScheme
from graphopt.interop.coreai_utils.passes import (
    palettize_weights,
    quantize_weights,
    sparsify_weights,
)

__all__ = [
    "CompressionGranularity",
    "DType",
    "QScheme",
    "palettize_weights",
    "quantize_weights",
    "sparsify_weights",
]

moved.provide(__name__)
