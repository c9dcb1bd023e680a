"""Strided views, diagonals, windows and rolls, in slices, reshapes and gathers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "as_strided",
    "diag_embed",
    "diagonal",
    "diagonal_scatter",
    "pad_in_turn",
    "pad_or_cut",
    "roll",
    "select_scatter",
    "trace",
    "unfold",
]


def diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """Every (columns + 1)-th element of the flattened matrix."""
    dim1, dim2 = dim1 % x.dim(), dim2 % x.dim()
    rest = [axis for axis in range(x.dim()) if axis not in (dim1, dim2)]
    rows, columns = x.shape[dim1], x.shape[dim2]
    start = offset if offset >= 0 else -offset * columns
    length = max(0, min(rows, columns - offset) if offset >= 0 else min(rows + offset, columns))
    flat = x.permute([*rest, dim1, dim2]).reshape([*(x.shape[a] for a in rest), rows * columns])
    end = start + (length - 1) * (columns + 1) + 1 if length else start
    return flat[..., start : end : columns + 1]


def trace(x: Tensor) -> Tensor:
    """Sum of the diagonal."""
    return diagonal(x).sum()


def _on_diagonal(rows: int, columns: int, offset: int) -> Tensor:
    return torch.arange(columns).reshape(1, -1) - torch.arange(rows).reshape(-1, 1) == offset


def diag_embed(x: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
    """A matrix for each vector, with it on a diagonal."""
    size = x.shape[-1] + abs(offset)
    padded = torch.nn.functional.pad(x, (max(offset, 0), max(-offset, 0)))
    full = padded.unsqueeze(-2).expand([*x.shape[:-1], size, size])
    # column j of the padded vector is element j - offset
    matrix = torch.where(_on_diagonal(size, size, offset), full, torch.zeros_like(full))
    rank = x.dim() + 1
    return matrix.movedim((-2, -1), (dim1 % rank, dim2 % rank))


def diagonal_scatter(
    x: Tensor, source: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Tensor:
    """The tensor with another diagonal."""
    moved = x.movedim((dim1, dim2), (-2, -1))
    rows, columns = moved.shape[-2:]
    before, length = max(offset, 0), source.shape[-1]
    padded = torch.nn.functional.pad(source, (before, columns - before - length))
    full = padded.unsqueeze(-2).expand(moved.shape)
    result = torch.where(_on_diagonal(rows, columns, offset), full.to(x.dtype), moved)
    return result.movedim((-2, -1), (dim1, dim2))


def unfold(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    """Windows along an axis, their elements in the last one."""
    if not x.dim():
        return x.reshape(1)[:size]
    dim = dim % x.dim()
    count = (x.shape[dim] - size) // step + 1
    starts = torch.arange(count).reshape(-1, 1) * step
    places = (starts + torch.arange(size).reshape(1, -1)).reshape(-1)
    windows = x.index_select(dim, places)
    full = windows.reshape([*x.shape[:dim], count, size, *x.shape[dim + 1 :]])
    return full.movedim(dim + 1, -1)


def roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    """The end of an axis moved to its front."""
    if not dims:
        return _rolled(x.reshape(-1), shifts[0], 0).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        x = _rolled(x, shift, dim)
    return x


def _rolled(x: Tensor, shift: int, dim: int) -> Tensor:
    size = x.shape[dim]
    shift = shift % size if size else 0
    if not shift:
        return x.clone()
    return torch.cat([x.narrow(dim, size - shift, shift), x.narrow(dim, 0, size - shift)], dim)


def as_strided(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: Any = None) -> Any:
    """Elements of a contiguous tensor by their positions; else left alone."""
    if not x.is_contiguous() or not all(isinstance(n, int) for n in (*size, *stride)):
        return NotImplemented
    places = torch.full([1] * len(size), offset or 0, dtype=torch.int64)
    for axis, (length, step) in enumerate(zip(size, stride, strict=True)):
        shape = [-1 if other == axis else 1 for other in range(len(size))]
        places = places + (torch.arange(length) * step).reshape(shape)
    return x.reshape(-1).index_select(0, places.reshape(-1)).reshape(list(size))


def select_scatter(x: Tensor, source: Tensor, dim: int, index: int) -> Tensor:
    """One slice replaced, in the tensor's type."""
    dim = dim % x.dim()
    index = index % x.shape[dim]
    middle = source.to(x.dtype).unsqueeze(dim)
    parts = [x.narrow(dim, 0, index), middle, x.narrow(dim, index + 1, x.shape[dim] - index - 1)]
    return torch.cat([part for part in parts if part.shape[dim]], dim)


def pad_or_cut(x: Tensor, pad: Sequence[int], value: Any = 0) -> Any:
    """Negative paddings cut; left alone where there are none."""
    if all(width >= 0 for width in pad):
        return NotImplemented
    for i in range(len(pad) // 2):
        axis, (before, after) = x.dim() - 1 - i, pad[2 * i : 2 * i + 2]
        start, cut = max(-before, 0), max(-before, 0) + max(-after, 0)
        x = x.narrow(axis, start, x.shape[axis] - cut)
    widths = [max(width, 0) for width in pad]
    return torch.nn.functional.pad(x, widths, value=value) if any(widths) else x.clone()


def pad_in_turn(x: Tensor, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Any:
    """Negative paddings cut, circular ones from the other end; else left alone."""
    if mode == "constant":
        return pad_or_cut(x, pad, 0 if value is None else value)
    if mode != "circular" and all(width >= 0 for width in pad):
        return NotImplemented
    for i in range(len(pad) // 2):
        axis, (before, after) = x.dim() - 1 - i, pad[2 * i : 2 * i + 2]
        start, size = max(-before, 0), x.shape[axis]
        kept = x.narrow(axis, start, size - start - max(-after, 0))
        source = kept if mode == "circular" else x
        parts = [_border(source, axis, before, mode, first=True)] if before > 0 else []
        parts += [kept, *([_border(source, axis, after, mode, first=False)] if after > 0 else [])]
        x = torch.cat(parts, axis) if len(parts) > 1 else kept
    return x


def _border(x: Tensor, axis: int, width: int, mode: str, first: bool) -> Tensor:
    """What stands before or behind `x` along an axis."""
    size = x.shape[axis]
    if mode == "circular":
        return x.narrow(axis, size - width if first else 0, width)
    if mode == "reflect":
        return x.narrow(axis, 1 if first else size - 1 - width, width).flip(axis)
    edge = x.narrow(axis, 0 if first else size - 1, 1)
    return torch.cat([edge] * width, axis)
