"""Constant tensors by their sizes, values and types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "arange",
    "full_like",
    "full_without_axes",
    "meshgrid",
    "new_full",
    "ones",
    "ones_like",
    "polar",
    "zeros",
    "zeros_like",
]


def full_without_axes(size: Sequence[int], value: Any, *, dtype: Any = None, **_: Any) -> Any:
    """A number; left alone where there are axes."""
    if len(size):
        return NotImplemented
    return torch.scalar_tensor(value, dtype=dtype)


def full_like(x: Tensor, value: Any, *, dtype: Any = None, **_: Any) -> Any:
    """By the sizes; left alone where they are open."""
    if not all(isinstance(size, int) for size in x.shape):
        return NotImplemented
    return torch.full(list(x.shape), value, dtype=dtype or x.dtype)


def zeros_like(x: Tensor, *, dtype: Any = None, **_: Any) -> Any:
    """By the sizes; left alone where they are open."""
    return full_like(x, 0, dtype=dtype)


def ones_like(x: Tensor, *, dtype: Any = None, **_: Any) -> Any:
    """By the sizes; left alone where they are open."""
    return full_like(x, 1, dtype=dtype)


def new_full(x: Tensor, size: Sequence[int], value: Any = 0, *, dtype: Any = None, **_: Any) -> Any:
    """Of the tensor's type unless another is given."""
    return torch.full(list(size), value, dtype=dtype or x.dtype)


def zeros(size: Sequence[int], *, dtype: Any = None, **_: Any) -> Any:
    """Also for what is not filled at all."""
    return torch.full(list(size), 0, dtype=dtype or torch.get_default_dtype())


def ones(size: Sequence[int], *, dtype: Any = None, **_: Any) -> Any:
    """Of no axes too."""
    return torch.full(list(size), 1, dtype=dtype or torch.get_default_dtype())


def arange(start: Any, end: Any = None, step: Any = 1, *, dtype: Any = None, **_: Any) -> Any:
    """Numbers of the wanted type from the start; of open sizes, integers become it; else left alone."""
    start, end = (0, start) if end is None else (start, end)
    given = (start, end, step)
    if not all(isinstance(number, int | float) for number in given):
        whole = all(isinstance(number, int | torch.SymInt) for number in given)
        if whole and dtype is not None and dtype.is_floating_point:
            return torch.arange(*given).to(dtype)
        return NotImplemented
    floats = any(isinstance(number, float) for number in given)
    wanted = dtype or (torch.get_default_dtype() if floats else torch.int64)
    if wanted.is_floating_point == floats:
        return NotImplemented
    if wanted.is_floating_point:
        return torch.arange(*map(float, given), dtype=wanted)
    return torch.arange(*given, dtype=torch.float32).to(wanted)


def meshgrid(tensors: Sequence[Tensor], *, indexing: str = "ij") -> list[Tensor]:
    """Each vector along an axis of its own, as often as the others are long."""
    turned = indexing == "xy" and len(tensors) > 1
    order = [tensors[1], tensors[0], *tensors[2:]] if turned else list(tensors)
    sizes = [vector.numel() for vector in order]
    grids = []
    for axis, vector in enumerate(order):
        shape = [1] * len(order)
        shape[axis] = sizes[axis]
        grids.append(vector.reshape(shape).expand(sizes))
    return [grids[1], grids[0], *grids[2:]] if turned else grids


def polar(length: Tensor, angle: Tensor) -> Tensor:
    """Complex numbers by length and angle; torch's own rule writes into memory."""
    return torch.complex(length * angle.cos(), length * angle.sin())
