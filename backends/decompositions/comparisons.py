"""Scatters and bags of rows, found by comparing indices with places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import LoweringError

__all__ = [
    "along",
    "as_strided_scatter",
    "cut",
    "embedding_bag",
    "embedding_renorm",
    "put_back",
    "scatter_reduce",
]

_ONE_HOT = 2**24


def along(x: Tensor, dim: int) -> int:
    """An axis counted from the front."""
    return dim % x.ndim if x.ndim else 0


def as_strided_scatter(
    x: Tensor,
    src: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Tensor:
    """Values put at places of the flattened tensor."""
    every = torch.arange(x.numel(), device=x.device)
    place = torch.as_strided(every, size, stride, storage_offset or 0).reshape(-1)
    return torch.scatter(x.reshape(-1), 0, place, src.reshape(-1)).reshape(x.shape)


def cut(x: Tensor, index: Tensor, but: int | None = None) -> Tensor:
    """A tensor as large as its indices, but for one axis."""
    for axis, size in enumerate(index.shape):
        if axis != but and int(x.shape[axis]) != int(size):
            x = torch.narrow(x, axis, 0, int(size))
    return x


def scatter_reduce(
    x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """Each place reduces what is scattered to it, found by comparing indices with places.

    Raises:
        LoweringError: The comparison would have more elements than fit.
    """
    if x.ndim == 0:
        made = scatter_reduce(
            x.reshape(1), 0, index.reshape(1), src.reshape(1), reduce, include_self=include_self
        )
        return made.reshape(())
    axis = along(x, dim)
    if index.numel() == 0:
        return x.clone()
    length = int(x.shape[axis])
    if index.numel() * length > _ONE_HOT:
        raise LoweringError(
            f"scatter_reduce of {index.numel()} values to {length} places compares all with all;"
            " split the call"
        )
    src = torch.movedim(cut(src, index), axis, -1)[..., None, :]
    moved = torch.movedim(index, axis, -1)[..., None, :]
    places = torch.arange(length, device=x.device)[:, None]
    met = torch.eq(moved, places)
    whole = torch.movedim(x, axis, -1)
    # places that no index reaches on axes where there are fewer indices than places keep their value
    own = whole
    for other, size in enumerate(met.shape[:-2]):
        own = torch.narrow(own, other, 0, int(size))
    made = _reduced(own, met, src, reduce, include_self)
    if own.shape != whole.shape:
        made = put_back(whole, made)
    return torch.movedim(made, -1, axis)


def _reduced(own: Tensor, met: Tensor, src: Tensor, reduce: str, include_self: bool) -> Tensor:
    reached = torch.any(met, -1)
    fills = {"sum": 0, "mean": 0, "prod": 1, "amax": -math.inf, "amin": math.inf}
    fill: Any = fills[reduce]
    if not own.is_floating_point() and reduce in ("amax", "amin"):
        fill = -(2**31) + 1 if reduce == "amax" else 2**31 - 1
    values = torch.where(met, src.expand(met.shape), torch.full_like(src, fill).expand(met.shape))
    if reduce in ("sum", "mean"):
        result = torch.sum(values, -1).to(own.dtype)
        count = torch.sum(met.to(own.dtype), -1)
        if include_self:
            result, count = result + own, count + 1
        if reduce == "mean":
            count = torch.clamp(count, min=1)
            whole = not own.is_floating_point()
            result = torch.div(result, count, rounding_mode="floor") if whole else result / count
    elif reduce == "prod":
        result = torch.prod(values, -1).to(own.dtype)
        result = result * own if include_self else result
    else:
        best, pick = (
            (torch.amax, torch.maximum) if reduce == "amax" else (torch.amin, torch.minimum)
        )
        result = best(values, -1)
        result = pick(result, own) if include_self else result
    return result if include_self else torch.where(reached, result, own)


def put_back(whole: Tensor, part: Tensor) -> Tensor:
    """A tensor whose first elements on every axis are replaced."""
    for axis in reversed(range(whole.ndim)):
        size, done = int(whole.shape[axis]), int(part.shape[axis])
        if size == done:
            continue
        rest = torch.narrow(whole, axis, done, size - done)
        for other in range(axis):
            rest = torch.narrow(rest, other, 0, int(part.shape[other]))
        part = torch.cat([part, rest], axis)
    return part


def embedding_renorm(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Rows that are looked up and longer than allowed, shortened."""
    size = torch.linalg.vector_norm(weight, norm_type, 1, keepdim=True)
    rows = torch.arange(int(weight.shape[0]), device=weight.device)[:, None]
    used = torch.any(torch.eq(rows, indices.reshape(1, -1)), 1, keepdim=True)
    factor = torch.where(torch.gt(size, max_norm), max_norm / (size + 1e-7), torch.ones_like(size))
    return torch.where(used, weight * factor, weight)


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums, means or maxima of the rows of each bag, which comparisons with the offsets find."""
    del scale_grad_by_freq, sparse
    starts = offsets[:-1] if include_last_offset else offsets
    bags = int(starts.shape[0])
    count = int(indices.shape[0])
    place = torch.arange(count, device=indices.device)[None]
    started = torch.ge(place, starts[:, None]).to(torch.int64)
    bag = torch.sum(started, 0) - 1
    member = torch.eq(bag[None], torch.arange(bags, device=indices.device)[:, None])
    if padding_idx >= 0:
        member = torch.logical_and(member, torch.ne(indices, padding_idx)[None])
    rows = torch.nn.functional.embedding(indices, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    sizes = torch.sum(member.to(torch.int64), 1)
    if mode == 2:
        low = torch.full_like(rows, -math.inf)
        found = torch.amax(torch.where(member[..., None], rows[None], low[None]), 1)
        made = torch.where(torch.eq(sizes, 0)[:, None], torch.zeros_like(found), found)
    else:
        made = torch.matmul(member.to(rows.dtype), rows)
        if mode == 1:
            made = made / torch.clamp(sizes, min=1)[:, None].to(rows.dtype)
    return made, bag, sizes, sizes
