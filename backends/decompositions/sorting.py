"""Sorting and what is found by it or by comparing everything with everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.backends.decompositions.indexing import wrapped

__all__ = [
    "argsort",
    "bucketize",
    "histc",
    "kthvalue",
    "median",
    "median_along",
    "mode",
    "nanmedian",
    "nanmedian_along",
    "searchsorted",
    "sort",
    "topk_of_scalar",
]


def sort(x: Tensor, dim: int = -1, descending: bool = False, **_: Any) -> tuple[Tensor, Tensor]:
    """The largest or smallest elements, all of them."""
    if not x.dim():
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    values, places = torch.topk(x, x.shape[dim], dim, largest=descending, sorted=True)
    return values, places


def argsort(x: Tensor, dim: int = -1, descending: bool = False, **_: Any) -> Tensor:
    """The second of `sort`."""
    return sort(x, dim, descending)[1]


def kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """One of the sorted elements."""
    if not x.dim():
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    values, places = torch.topk(x, k, dim, largest=False, sorted=True)
    values, places = values.narrow(dim, k - 1, 1), places.narrow(dim, k - 1, 1)
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


def median(x: Tensor) -> Tensor:
    """The lower of two in the middle."""
    return median_along(x.reshape(-1), 0)[0]


def median_along(x: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower of two in the middle."""
    size = x.shape[dim] if x.dim() else 1
    return kthvalue(x, (size - 1) // 2 + 1, dim, keepdim)


def nanmedian(x: Tensor) -> Tensor:
    """Of what is a number."""
    return nanmedian_along(x.reshape(-1), 0)[0]


def nanmedian_along(x: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Sorted with NaN behind the infinities, the middle of the others."""
    if not x.dim():
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    missing = x != x
    full = torch.where(missing, torch.full_like(x, float("inf")), x)
    values, places = torch.topk(full, x.shape[dim], dim, largest=False, sorted=True)
    count = (~missing).to(torch.int64).sum(dim, keepdim=True)
    middle = torch.clamp_min((count - 1) // 2, 0)
    value = torch.where(count == 0, float("nan"), torch.gather(values, dim, middle))
    place = torch.gather(places, dim, middle)
    return (value, place) if keepdim else (value.squeeze(dim), place.squeeze(dim))


def mode(x: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The smallest of the most frequent elements, and where it is last."""
    if not x.dim():
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    moved = x.movedim(dim, -1)
    equal = (moved.unsqueeze(-1) == moved.unsqueeze(-2)).to(torch.int64)
    counts = equal.sum(-1)
    frequent = counts == counts.amax(-1, keepdim=True)
    high = float("inf") if x.is_floating_point() else torch.iinfo(x.dtype).max
    value = torch.where(frequent, moved, torch.full_like(moved, high))
    value = value.amin(-1, keepdim=True)
    turns = torch.arange(x.shape[dim])
    place = torch.where(moved == value, turns, torch.zeros_like(turns)).amax(-1, keepdim=True)
    value, place = value.movedim(-1, dim), place.movedim(-1, dim)
    return (value, place) if keepdim else (value.squeeze(dim), place.squeeze(dim))


def searchsorted(
    sequence: Tensor,
    values: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """How many elements come before."""
    if not isinstance(values, Tensor):
        values = torch.full([], values, dtype=sequence.dtype)
    if sorter is not None:
        sequence = torch.gather(sequence, -1, wrapped(sorter, sequence.shape[-1]))
    if sequence.dim() > 1:
        sequence = sequence.unsqueeze(-2)
    each = values.unsqueeze(-1)
    before = sequence <= each if right or side == "right" else sequence < each
    kind = torch.int32 if out_int32 else torch.int64
    return before.to(kind).sum(-1).to(kind)


def topk_of_scalar(x: Tensor, k: int, *args: Any, **kwargs: Any) -> Any:
    """A scalar is its own; else left alone."""
    return NotImplemented if x.dim() else (x.clone(), torch.zeros_like(x, dtype=torch.int64))


def bucketize(
    values: Any, boundaries: Tensor, *, out_int32: bool = False, right: bool = False
) -> Tensor:
    """How many boundaries come before."""
    return searchsorted(boundaries, values, out_int32=out_int32, right=right)


def histc(x: Tensor, bins: int = 100, min: Any = 0, max: Any = 0) -> Tensor:
    """How many elements are in each of equal bins."""
    flat = x.reshape(-1, 1)
    low: Any = min
    high: Any = max
    width: Any = max - min if max != min else 1
    if min == max == 0:
        low, high = flat.amin(), flat.amax()
        apart = high > low
        low, high = torch.where(apart, low, low - 1), torch.where(apart, high, high + 1)
        width = high - low
    place = torch.floor((flat - low) * bins / width)
    place = torch.where(flat == high, torch.full_like(place, bins - 1), place)
    inside = (flat >= low) & (flat <= high)
    hit = (place == torch.arange(bins, dtype=place.dtype)) & inside
    return hit.to(x.dtype).sum(0)
