"""Pooling in gathers of windows, products with matrices and plain pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "MaxPool",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "avg_pool",
    "max_pool_with_indices",
    "max_unpool",
]


def _tuple(value: Any, n: int, default: Any = None) -> list[int]:
    if value is None or (isinstance(value, Sequence) and not value):
        value = default
    given = [int(i) for i in value] if isinstance(value, Sequence) else [int(value)]
    return given * n if len(given) == 1 else given


def _pooled_size(size: int, kernel: int, stride: int, pad: int, dilation: int, ceil: bool) -> int:
    span = size + 2 * pad - dilation * (kernel - 1) - 1
    out = (-(-span // stride) if ceil else span // stride) + 1
    return out - 1 if ceil and (out - 1) * stride >= size + pad else out


def avg_pool(
    n: int,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Sums over padded windows by constant divisors; left alone where no window is cut."""
    kernel, pad = _tuple(kernel_size, n), _tuple(padding, n)
    steps = _tuple(stride, n, kernel)
    sizes = x.shape[-n:]
    geometry = list(zip(sizes, kernel, steps, pad, strict=True))
    outs = [_pooled_size(size, k, s, p, 1, ceil_mode) for size, k, s, p in geometry]
    ends = [
        (out - 1) * s + k - size - p for out, (size, k, s, p) in zip(outs, geometry, strict=True)
    ]
    cut = any(end > p for end, p in zip(ends, pad, strict=True))
    if divisor_override is None and not cut and x.dim() == n + 2:
        # a window that ends early is none of the plain form's
        if not ceil_mode:
            return NotImplemented
        return _plain(n, x, kernel, steps, pad, count_include_pad)
    widths = [
        width for p, end in zip(reversed(pad), reversed(ends), strict=True) for width in (p, end)
    ]
    shape = x.shape[:-n]
    flat = x.reshape([1, math.prod(shape), *sizes])
    means = _plain(n, F.pad(flat, widths), kernel, steps, [0] * n, True)
    if divisor_override is not None:
        result = means * (math.prod(kernel) / divisor_override)
    else:
        result = means * _shares(geometry, outs, count_include_pad).to(x.dtype)
    return result.reshape([*shape, *outs])


def _shares(geometry: Sequence[Any], outs: Sequence[int], padded: bool) -> Tensor:
    """What each mean over a full window is to be multiplied by."""
    share = torch.ones([1, 1, *[1] * len(outs)])
    for axis, ((size, kernel, stride, pad), out) in enumerate(zip(geometry, outs, strict=True)):
        starts = torch.arange(out, dtype=torch.float32) * stride - pad
        ends = torch.clamp_max(starts + kernel, size + pad)
        if not padded:
            starts, ends = torch.clamp_min(starts, 0), torch.clamp_max(ends, size)
        shape = [-1 if axis + 2 == other else 1 for other in range(len(outs) + 2)]
        share = share * (kernel / (ends - starts)).reshape(shape)
    return share


def _plain(
    n: int, x: Tensor, kernel: list[int], stride: list[int], pad: list[int], padded: bool
) -> Tensor:
    if n == 1:
        return F.avg_pool2d(
            x.unsqueeze(-2), (1, *kernel), (1, *stride), (0, *pad), False, padded
        ).squeeze(-2)
    return (F.avg_pool2d, F.avg_pool3d)[n - 2](x, kernel, stride, pad, False, padded)


def _flat_windows(axes: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Positions [outputs, window] in flattened axes, from positions [out, kernel] along each."""
    flat = torch.zeros([1, 1], dtype=torch.int64)
    for places, size in axes:
        outer, inner = flat.shape
        out, kernel = places.shape
        flat = flat.reshape(outer, 1, inner, 1) * size + places.reshape(1, out, 1, kernel)
        flat = flat.reshape(outer * out, inner * kernel)
    return flat


def _largest(x: Tensor, axes: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Largest element of each window of the last axes, and its position in them flattened."""
    n = len(axes)
    lead = x.shape[:-n]
    windows = _flat_windows(axes)
    count, length = windows.shape
    flat = x.reshape([math.prod(lead), math.prod(x.shape[-n:])])
    cells = flat.index_select(1, windows.reshape(-1)).reshape(-1, count, length)
    values, turn = cells.amax(-1), cells.argmax(-1)
    chosen = turn.unsqueeze(-1) == torch.arange(length)
    places = torch.where(chosen, windows, torch.zeros_like(windows)).sum(-1)
    outs = [axis.shape[0] for axis, _ in axes]
    return values.reshape([*lead, *outs]), places.reshape([*lead, *outs])


def max_pool_with_indices(
    n: int,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Windows that leave the input read its nearest element of the window again."""
    kernel, pad, dil = _tuple(kernel_size, n), _tuple(padding, n), _tuple(dilation, n)
    steps = _tuple(stride, n, kernel)
    axes = []
    for size, k, s, p, d in zip(x.shape[-n:], kernel, steps, pad, dil, strict=True):
        out = _pooled_size(size, k, s, p, d, ceil_mode)
        starts = torch.arange(out).reshape(-1, 1) * s - p
        places = starts + torch.arange(k).reshape(1, -1) * d
        # the first and the last of the window's elements inside the input
        first = starts + torch.clamp_min(-(starts // d), 0) * d
        last = starts + torch.clamp_max((size - 1 - starts) // d, k - 1) * d
        axes.append((torch.minimum(torch.maximum(places, first), last), size))
    return _largest(x, axes)


class MaxPool:
    """A rule for maximum pooling without a batch axis, a stride, or with gaps in its windows."""

    def __init__(self, op: Any, n: int, *, places: bool = False) -> None:
        self.op, self.n, self.places = op, n, places

    def __call__(self, x: Tensor, kernel_size: Any, stride: Any = (), *rest: Any) -> Any:
        """Leave alone what has none of it."""
        defaults: tuple[Any, ...] = (0, 1, False)
        given = (*rest, *defaults[len(rest) :])
        if any(gap != 1 for gap in _tuple(given[1], self.n)):
            both = max_pool_with_indices(self.n, x, kernel_size, stride, *given)
            return both if self.places else both[0]
        if x.dim() == self.n + 1:
            pooled = self.op(x.unsqueeze(0), kernel_size, stride, *given)
            return tuple(y.squeeze(0) for y in pooled) if self.places else pooled.squeeze(0)
        return NotImplemented if stride else self.op(x, kernel_size, kernel_size, *given)


def max_unpool(n: int, x: Tensor, places: Tensor, size: Sequence[int], *_: Any) -> Tensor:
    """Elements put where they were taken from, zero elsewhere; the sizes say it all."""
    sizes = list(size)[-n:]
    lead = x.shape[:-n]
    rows = math.prod(lead)
    empty = torch.zeros([rows, math.prod(sizes)], dtype=x.dtype)
    full = torch.scatter(empty, 1, places.reshape(rows, -1), x.reshape(rows, -1))
    return full.reshape([*lead, *sizes])


def _bounds(size: int, out: int) -> tuple[Tensor, Tensor]:
    """Where each adaptive window starts and ends."""
    steps = torch.arange(out)
    return steps * size // out, -((steps + 1) * -size // out)


def _divides(x: Tensor, outs: Sequence[int]) -> bool:
    return all(size % out == 0 for size, out in zip(x.shape[-len(outs) :], outs, strict=True))


def adaptive_avg_pool(n: int, x: Tensor, output_size: Any) -> Any:
    """Products with matrices of averages; left alone for one output, plain where sizes divide."""
    outs = _tuple(output_size, n)
    if n == 2 and x.dim() == 4 and outs == [1, 1]:
        return NotImplemented
    if _divides(x, outs) and x.dim() == n + 2:
        kernel = [size // out for size, out in zip(x.shape[-n:], outs, strict=True)]
        return _plain(n, x, kernel, kernel, [0] * n, True)
    for offset, out in enumerate(outs):
        axis = x.dim() - n + offset
        first, last = (bound.reshape(-1, 1) for bound in _bounds(x.shape[axis], out))
        cells = torch.arange(x.shape[axis]).reshape(1, -1)
        inside = ((cells >= first) & (cells < last)).to(x.dtype)
        weights = inside / inside.sum(1, keepdim=True)
        x = torch.matmul(x.movedim(axis, -1), weights.T).movedim(-1, axis)
    return x


def adaptive_max_pool(n: int, x: Tensor, output_size: Any) -> tuple[Tensor, Tensor]:
    """Gathered windows; shorter ones read their last element again."""
    axes = []
    for size, out in zip(x.shape[-n:], _tuple(output_size, n), strict=True):
        first, last = (bound.reshape(-1, 1) for bound in _bounds(size, out))
        longest = max(-(-(i + 1) * size // out) - i * size // out for i in range(out))
        places = torch.minimum(first + torch.arange(longest).reshape(1, -1), last - 1)
        axes.append((places, size))
    return _largest(x, axes)
