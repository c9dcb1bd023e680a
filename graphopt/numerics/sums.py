"""Sums over many values without a wide copy of them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sum_of_squares"]

_PART = 4096  # values that are summed up in float32


def sum_of_squares(tensor: Tensor) -> float:
    """Sum of the squares of all values; parts of 4,096 are summed up in float32, these in float64.

    Args:
        tensor: Any shape, floating point, any device.
    """
    flat = tensor.detach().float().reshape(-1)
    whole = len(flat) // _PART * _PART
    parts, rest = flat[:whole].reshape(-1, _PART), flat[whole:]
    return float(torch.linalg.vecdot(parts, parts).double().sum()) + float(rest.dot(rest))
