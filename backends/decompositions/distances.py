"""Distances between vectors, and products of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.backends.decompositions.reductions import vector_norm

__all__ = ["cdist", "cross", "pdist"]


def _length(gap: Tensor, order: float) -> Tensor:
    length = vector_norm(gap, order, [-1])
    if length is NotImplemented:
        return (gap * gap).sum(-1).sqrt()
    assert isinstance(length, Tensor)
    return length


def cdist(x: Tensor, y: Tensor, order: float, mode: Any = None) -> Tensor:
    """Of every vector of one to every vector of the other."""
    return _length(x.unsqueeze(-2) - y.unsqueeze(-3), order)


def pdist(x: Tensor, order: float = 2.0) -> Tensor:
    """Of every vector to those behind it."""
    n = x.shape[0]
    pairs = cdist(x, x, order).reshape(-1)
    parts = [pairs[i * n + i + 1 : (i + 1) * n] for i in range(n - 1)]
    return torch.cat(parts) if parts else pairs[:0]


def cross(x: Tensor, y: Tensor, *, dim: int = -1) -> Tensor:
    """The vector perpendicular to two."""
    x, y = torch.broadcast_tensors(x, y)
    a, b = (torch.unbind(value, dim) for value in (x, y))
    turns = [(1, 2), (2, 0), (0, 1)]
    return torch.stack([a[i] * b[j] - a[j] * b[i] for i, j in turns], dim)
