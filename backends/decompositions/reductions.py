"""Reductions in sums, products and comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "all_true",
    "aminmax",
    "any_true",
    "argmax_of_all",
    "argmin_of_all",
    "count_nonzero",
    "mean",
    "std",
    "std_mean",
    "sum_of_type",
    "var",
    "var_mean",
    "vector_norm",
]


def axes_of(x: Tensor, dim: Any) -> list[int]:
    """Axes that are not negative; all of them where none is given, none of a tensor without axes."""
    if not x.dim():
        return []
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return list(range(x.dim()))
    given = dim if isinstance(dim, Sequence) else [dim]
    return [axis % x.dim() for axis in given]


def var_mean(
    x: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean square distance to the mean, by `n - correction`, and the mean."""
    axes = axes_of(x, dim)
    count = math.prod(x.shape[axis] for axis in axes)
    mean = x.mean(axes, keepdim=True) if axes else x
    gap = x - mean
    squares = gap * gap
    total = squares.sum(axes, keepdim=keepdim) if axes else squares
    correction = 1 if correction is None else correction
    value = total / max(count - correction, 0) if count > correction else total * math.nan
    if not keepdim and axes:
        mean = mean.reshape(value.shape)
    return value, mean


def var(x: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: bool = False) -> Tensor:
    """The first of `var_mean`."""
    return var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def std(x: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: bool = False) -> Tensor:
    """The root of the variance."""
    return var(x, dim, correction=correction, keepdim=keepdim).sqrt()


def std_mean(
    x: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """The root of the variance, and the mean."""
    value, mean = var_mean(x, dim, correction=correction, keepdim=keepdim)
    return value.sqrt(), mean


def mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """In another type; left alone where it is the input's."""
    if dtype is None or dtype == x.dtype:
        return NotImplemented
    return x.to(dtype).mean(dim, keepdim) if dim is not None else x.to(dtype).mean()


def sum_of_type(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """In another type, integers for booleans; left alone where it is the input's."""
    exact = x.is_floating_point() or x.dtype is torch.int64
    wanted = dtype or (x.dtype if exact else torch.int64)
    if wanted == x.dtype:
        return NotImplemented
    x = x.to(wanted)
    return x.sum(dim, keepdim) if dim is not None else x.sum()


def any_true(x: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    """Of what is not 0; left alone for booleans."""
    if x.dtype is torch.bool:
        return NotImplemented
    return (x != 0).any() if dim is None else (x != 0).any(dim, keepdim)


def all_true(x: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    """Of what is not 0; left alone for booleans."""
    if x.dtype is torch.bool:
        return NotImplemented
    return (x != 0).all() if dim is None else (x != 0).all(dim, keepdim)


def count_nonzero(x: Tensor, dim: Any = None) -> Tensor:
    """Sum of what is not 0."""
    hit = (x != 0).to(torch.int64)
    axes = axes_of(x, dim)
    return hit.sum(axes) if axes else hit


def aminmax(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The least and the largest, of all or along an axis."""
    axes = axes_of(x, dim)
    return (x.amin(axes, keepdim), x.amax(axes, keepdim)) if axes else (x.clone(), x.clone())


def argmax_of_all(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """Over the flattened tensor; left alone along an axis."""
    if dim is not None:
        return NotImplemented
    place = x.reshape(-1).argmax(0)
    return place.reshape([1] * x.dim()) if keepdim else place


def argmin_of_all(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """Over the flattened tensor; left alone along an axis."""
    if dim is not None:
        return NotImplemented
    place = x.reshape(-1).argmin(0)
    return place.reshape([1] * x.dim()) if keepdim else place


def vector_norm(
    x: Tensor, order: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    """Of any order; left alone for the Euclidean norm along axes in the input's type."""
    if order == 2 and dim is not None and dtype in (None, x.dtype) and x.dim():
        return NotImplemented
    x = x.to(dtype) if dtype is not None else x
    axes = axes_of(x, dim)
    size = x.abs()
    if not axes:
        return (size != 0).to(x.dtype) if order == 0 else size
    if order == math.inf:
        return size.amax(axes, keepdim)
    if order == -math.inf:
        return size.amin(axes, keepdim)
    if order == 0:
        return (size != 0).to(x.dtype).sum(axes, keepdim)
    if order == 1:
        return size.sum(axes, keepdim)
    if order == 2:
        return (x * x).sum(axes, keepdim).sqrt()
    return size.pow(order).sum(axes, keepdim).pow(1.0 / order)
