"""The op vocabulary of compressed programs."""

from graphopt.ir.ops import (
    STORAGE_BITS,
    lut_to_dense,
    round_by_range,
    round_to_float,
    shift_scale,
    sparse_to_dense,
)

__all__ = [
    "STORAGE_BITS",
    "lut_to_dense",
    "round_by_range",
    "round_to_float",
    "shift_scale",
    "sparse_to_dense",
]
