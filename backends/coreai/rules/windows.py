"""Pooling whose windows lie over the edge, and indices of maxima."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.backends.decompositions import pooling, resize

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool",
    "bilinear2d",
    "by_factors",
    "max_pool2d",
    "max_pool3d",
    "nearest2d",
]

Sizes = int | Sequence[int]
Op = Callable[..., Any]


def _each(value: Sizes | None, dims: int, default: Sequence[int]) -> list[int]:
    if value is None or (not isinstance(value, int) and len(value) == 0):
        return list(default)
    listed = [value] if isinstance(value, int) else [int(item) for item in value]
    return listed * dims if len(listed) == 1 else listed


def _count(size: int, kernel: int, step: int, pad: int, dilation: int, ceil: bool) -> int:
    """Number of windows along an axis; the last one begins inside the input or its left padding."""
    span = size + 2 * pad - dilation * (kernel - 1) - 1
    count = (-(-span // step) if ceil else span // step) + 1
    return count - 1 if ceil and (count - 1) * step >= size + pad else count


def _beyond(size: int, kernel: int, step: int, pad: int, dilation: int, count: int) -> int:
    """Elements behind the right padding that the last window reads."""
    return max(0, (count - 1) * step + dilation * (kernel - 1) + 1 - (size + 2 * pad))


def avg_pool(dims: int) -> Callable[..., Any]:
    """Average pooling whose divisor differs between windows; others stay.

    Args:
        dims: 2 or 3.
    """

    def rule(
        whole: Op,
        x: Tensor,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        kernel = _each(kernel_size, dims, ())
        step = _each(stride, dims, kernel)
        pad = _each(padding, dims, ())
        if x.ndim == dims + 1:
            args = (kernel, step, pad, ceil_mode, count_include_pad, divisor_override)
            return torch.squeeze(rule(whole, torch.unsqueeze(x, 0), *args), 0)
        # sizes may be open
        sizes = list(x.shape[2:])
        windows = [
            _count(*each, 1, ceil_mode) for each in zip(sizes, kernel, step, pad, strict=True)
        ]
        more = [
            _beyond(size, width, jump, edge, 1, count) if ceil_mode else 0
            for size, width, jump, edge, count in zip(
                sizes, kernel, step, pad, windows, strict=True
            )
        ]
        padded = [0] * (2 * dims)
        for axis in range(dims):
            padded[2 * (dims - 1 - axis)] = pad[axis]
            padded[2 * (dims - 1 - axis) + 1] = pad[axis] + more[axis]
        inside = count_include_pad or not any(pad)
        if not any(more) and (inside or divisor_override):
            if not divisor_override and any(pad):
                return whole(x, kernel, step, pad)
            rest = (False, True, divisor_override) if divisor_override else ()
            return whole(x, kernel, step, pad, *rest)
        source = functional.pad(x, padded) if any(padded) else x
        none = [0] * dims
        if divisor_override:
            return whole(source, kernel, step, none, False, True, divisor_override)
        sums = whole(source, kernel, step, none, False, True, 1)
        counts = [
            _held(*each, count_include_pad, x)
            for each in zip(sizes, kernel, step, pad, windows, strict=True)
        ]
        divisor = counts[0]
        for count in counts[1:]:
            divisor = divisor[..., None] * count
        return sums / divisor

    return rule


def _held(
    size: int, kernel: int, step: int, pad: int, count: int, padding_counts: bool, like: Tensor
) -> Tensor:
    """How many elements each window along an axis holds."""
    start = torch.arange(count, device=like.device) * step - pad
    end = torch.clamp(start + kernel, max=size + pad)
    if not padding_counts:
        start, end = torch.clamp(start, min=0), torch.clamp(end, max=size)
    return (end - start).to(like.dtype)


def max_pool2d(
    whole: Op,
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Maxima by the op itself, over explicit padding where windows lie over the edge, and indices."""
    if x.ndim == 3:
        args = (kernel_size, stride, padding, dilation, ceil_mode)
        values, places = max_pool2d(whole, torch.unsqueeze(x, 0), *args)
        return torch.squeeze(values, 0), torch.squeeze(places, 0)
    kernel = _each(kernel_size, 2, ())
    step, pad = _each(stride, 2, kernel), _each(padding, 2, ())
    dilated = _each(dilation, 2, ())
    if not ceil_mode and any(isinstance(size, torch.SymInt) for size in x.shape):
        first: tuple[Tensor, Tensor] = whole(x, kernel, step, pad, dilated)
        return first
    axes = list(zip((int(size) for size in x.shape[2:]), kernel, step, pad, dilated, strict=True))
    windows = [_count(*axis, ceil_mode) for axis in axes]
    more = [_beyond(*axis, count) for axis, count in zip(axes, windows, strict=True)]
    if any(more):
        (low, high), (left, right) = ((p, p + m) for p, m in zip(pad, more, strict=True))
        source = functional.pad(x, [left, right, low, high], value=-math.inf)
        values = whole(source, kernel, step, [0, 0], dilated)[0]
    else:
        values = whole(x, kernel, step, pad, dilated)[0]
    places, inside = _windows(axes, windows, x)
    return values, _best(x, places, inside, windows)[1]


def _windows(
    axes: Sequence[tuple[int, ...]], windows: Sequence[int], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Places in the flattened image that each window reads, and which of them are in the image."""
    places = torch.zeros((1, 1), dtype=torch.int64, device=like.device)
    inside = torch.ones((1, 1), dtype=torch.bool, device=like.device)
    for (size, kernel, step, pad, dilation), count in zip(axes, windows, strict=True):
        start = torch.arange(count, device=like.device)[:, None] * step - pad
        row = start + torch.arange(kernel, device=like.device)[None] * dilation
        good = torch.logical_and(torch.ge(row, 0), torch.lt(row, size))
        row = torch.clamp(row, 0, size - 1)
        places = (places[:, None, :, None] * size + row[None, :, None, :]).flatten(2).flatten(0, 1)
        inside = torch.logical_and(inside[:, None, :, None], good[None, :, None, :])
        inside = inside.flatten(2).flatten(0, 1)
    return places, inside


def _best(
    x: Tensor, places: Tensor, inside: Tensor, windows: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The largest element of each window, and where it is in the flattened image."""
    dims = len(windows)
    flat = x.flatten(-dims)
    lead = [int(size) for size in flat.shape[:-1]]
    read = torch.index_select(flat, -1, places.reshape(-1)).reshape(*lead, *places.shape)
    read = torch.where(inside, read, torch.full_like(read, -math.inf))
    values, chosen = torch.max(read, -1)
    shape = [*[1] * len(lead), *places.shape]
    spread = places.reshape(shape).expand(read.shape)
    index = torch.squeeze(torch.gather(spread, -1, torch.unsqueeze(chosen, -1)), -1)
    return values.reshape(*lead, *windows), index.reshape(*lead, *windows)


def max_pool3d(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Maxima over planes and then over their stack; indices by reading all windows."""
    kernel = _each(kernel_size, 3, ())
    step, pad = _each(stride, 3, kernel), _each(padding, 3, ())
    dilated = _each(dilation, 3, ())
    sizes = [int(size) for size in x.shape[-3:]]
    lead = [int(size) for size in x.shape[:-3]]
    axes = list(zip(sizes, kernel, step, pad, dilated, strict=True))
    windows = [_count(*axis, ceil_mode) for axis in axes]
    planes = functional.max_pool2d(
        x.reshape(1, -1, sizes[1], sizes[2]), kernel[1:], step[1:], pad[1:], dilated[1:], ceil_mode
    )
    values = functional.max_pool2d(
        planes.reshape(1, -1, sizes[0], windows[1] * windows[2]),
        [kernel[0], 1],
        [step[0], 1],
        [pad[0], 0],
        [dilated[0], 1],
        ceil_mode,
    ).reshape(*lead, *windows)
    places, inside = _windows(axes, windows, x)
    return values, _best(x, places, inside, windows)[1]


def adaptive_avg_pool2d(x: Tensor, output_size: Sequence[int]) -> Any:
    """Means over adaptive windows where there are more of them than rows; others stay."""
    if x.ndim == 3:
        return torch.nn.functional.adaptive_avg_pool2d(x[None], tuple(output_size))[0]  # type: ignore[arg-type]
    pairs = zip(x.shape[-2:], output_size, strict=True)
    if all(int(size) >= count for size, count in pairs):
        return NotImplemented
    return pooling.adaptive_avg_pool(2, x, output_size)


def nearest2d(
    x: Tensor, output_size: Sequence[int] | None, factors: Sequence[float] | None = None
) -> Any:
    """Rows by lookups; growth by integers stays."""
    if output_size is not None:
        return resize.nearest(x, output_size, None, None)
    assert factors is not None
    made = [int(int(size) * by) for size, by in zip(x.shape[-2:], factors, strict=True)]
    return resize.nearest(x, made, *factors)


def by_factors(rule: Op, dims: int) -> Op:
    """A resize by sizes or factors from one that takes both.

    Args:
        rule: Takes the tensor, sizes, whether corners are aligned, and a factor or None for each axis.
        dims: Number of axes.
    """

    def resized(
        x: Tensor,
        output_size: Sequence[int] | None,
        align_corners: bool,
        factors: Sequence[float] | None = None,
    ) -> Tensor:
        by: list[Any] = list(factors or [])
        given = output_size
        if given is None:
            given = [int(int(size) * f) for size, f in zip(x.shape[-dims:], by, strict=True)]
        return rule(x, given, align_corners, *(by or [None] * dims))

    return resized


def bilinear2d(
    x: Tensor,
    output_size: Sequence[int] | None,
    align_corners: bool,
    factors: Sequence[float] | None = None,
) -> Any:
    """Axes that keep their size are copied, whatever the factor; others stay."""
    sizes = [int(size) for size in x.shape[-2:]]
    if factors is None or all(
        int(size * factor) != size or factor == 1
        for size, factor in zip(sizes, factors, strict=True)
    ):
        return NotImplemented
    return by_factors(resize.linear, 2)(x, output_size, align_corners, factors)
