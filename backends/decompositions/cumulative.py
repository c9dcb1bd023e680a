"""Running products, extrema and sums of exponentials, in a logarithmic number of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.decompositions.pointwise import logaddexp

__all__ = ["cummax", "cummin", "cumprod", "cumsum", "logcumsumexp"]


def _running(x: Tensor, dim: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Each element combined with all before it: with the 1, 2, 4, ... before in turn."""
    step, size = 1, x.shape[dim]
    while step < size:
        tail = combine(x.narrow(dim, 0, size - step), x.narrow(dim, step, size - step))
        x = torch.cat([x.narrow(dim, 0, step), tail], dim)
        step *= 2
    return x


def cumprod(x: Tensor, dim: int, *, dtype: Any = None) -> Tensor:
    """Running products."""
    exact = x.is_floating_point() or x.dtype is torch.int64
    x = x.to(dtype or (x.dtype if exact else torch.int64))
    return _running(x, dim, torch.mul) if x.dim() else x.clone()


def cumsum(x: Tensor, dim: int, *, dtype: Any = None) -> Any:
    """Of a scalar, or in another type; else left alone."""
    exact = x.is_floating_point() or x.dtype is torch.int64
    wanted = dtype or (x.dtype if exact else torch.int64)
    if not x.dim():
        return x.to(wanted, copy=True)
    return NotImplemented if wanted == x.dtype else x.to(wanted).cumsum(dim)


def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """Running sums of exponentials, in logarithms."""
    return _running(x, dim, logaddexp) if x.dim() else x.clone()


def cummax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Running maxima, and where each was met last."""
    return _extremum(x, dim, largest=True)


def cummin(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Running minima, and where each was met last."""
    return _extremum(x, dim, largest=False)


def _extremum(x: Tensor, dim: int, largest: bool) -> tuple[Tensor, Tensor]:
    if not x.dim():
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    values = _running(x, dim, torch.maximum if largest else torch.minimum)
    shape = [1] * x.dim()
    shape[dim] = x.shape[dim]
    places = torch.arange(x.shape[dim]).reshape(shape).expand(x.shape)
    met = torch.where(x == values, places, torch.zeros_like(places))
    return values, _running(met, dim, torch.maximum)
