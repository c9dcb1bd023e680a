"""Resizing in gathers and products with matrices of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "bicubic",
    "bicubic_antialiased",
    "bilinear",
    "bilinear_antialiased",
    "linear",
    "nearest",
    "nearest_exact",
    "trilinear",
]


def _ratio(size: int, out: int, scale: float | None) -> float:
    return 1.0 / scale if scale is not None and scale > 0 else size / out


def _by_matrix(x: Tensor, axis: int, weights: Tensor) -> Tensor:
    """An axis multiplied by a matrix [out, size]."""
    moved = torch.matmul(x.movedim(axis, -1), weights.to(x.dtype).T)
    return moved.movedim(-1, axis)


def _centres(size: int, out: int, scale: float | None, aligned: bool) -> Tensor:
    """Where each output element lies among the input's."""
    steps = torch.arange(out, dtype=torch.float32)
    if aligned:
        return steps * ((size - 1) / (out - 1) if out > 1 else 0.0)
    return (steps + 0.5) * _ratio(size, out, scale) - 0.5


def _tent(distance: Tensor) -> Tensor:
    return torch.clamp_min(1 - distance.abs(), 0)


def _cubic(a: float) -> Callable[[Tensor], Tensor]:
    def weigh(distance: Tensor) -> Tensor:
        d = distance.abs()
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((d - 5) * d + 8) * d * a - 4 * a
        return torch.where(d < 1, near, torch.where(d < 2, far, torch.zeros_like(d)))

    return weigh


def _interpolated(
    x: Tensor,
    sizes: Sequence[int],
    scales: Sequence[float | None],
    aligned: bool,
    kernel: Callable[[Tensor], Tensor],
    reach: int,
) -> Tensor:
    """Each axis by the kernel; what lies outside reads the edge."""
    for offset, (out, scale) in enumerate(zip(sizes, scales, strict=True)):
        axis = x.dim() - len(sizes) + offset
        size = x.shape[axis]
        if reach == 1 and size == out:
            # torch copies, whatever the factor
            continue
        centres = _centres(size, out, scale, aligned)
        if reach == 1 and not aligned:
            centres = torch.clamp_min(centres, 0)
        cells = torch.arange(size).reshape(1, -1)
        weights = torch.zeros([out, size])
        lowest = torch.floor(centres)
        for step in range(1 - reach, reach + 1):
            place = lowest + step
            part = kernel(centres - place).reshape(-1, 1)
            cell = torch.clamp(place, 0, size - 1).to(torch.int64).reshape(-1, 1)
            weights = weights + part * (cell == cells).to(part.dtype)
        x = _by_matrix(x, axis, weights)
    return x


def _antialiased(
    x: Tensor,
    sizes: Sequence[int],
    scales: Sequence[float | None],
    aligned: bool,
    kernel: Callable[[Tensor], Tensor],
    reach: int,
) -> Tensor:
    """Each axis by the kernel, as wide as an output element; the weights sum to one."""
    for offset, (out, scale) in enumerate(zip(sizes, scales, strict=True)):
        axis = x.dim() - len(sizes) + offset
        size = x.shape[axis]
        corners = (size - 1) / (out - 1) if out > 1 else 0.0
        ratio = corners if aligned else _ratio(size, out, scale)
        width = max(ratio, 1.0)
        centres = ratio * (torch.arange(out, dtype=torch.float32) + 0.5).reshape(-1, 1)
        cells = torch.arange(size, dtype=torch.float32).reshape(1, -1)
        first = torch.floor(torch.clamp_min(centres - reach * width + 0.5, 0))
        last = torch.floor(torch.clamp_max(centres + reach * width + 0.5, size))
        weights = kernel((cells - centres + 0.5) / width)
        weights = torch.where((cells >= first) & (cells < last), weights, torch.zeros_like(weights))
        x = _by_matrix(x, axis, weights / weights.sum(1, keepdim=True))
    return x


def _nearest(
    x: Tensor, sizes: Sequence[int], scales: Sequence[float | None], shift: float
) -> Tensor:
    for offset, (out, scale) in enumerate(zip(sizes, scales, strict=True)):
        axis = x.dim() - len(sizes) + offset
        size = x.shape[axis]
        if size == out and (scale is None or scale == 1):
            continue
        places = (torch.arange(out, dtype=torch.float32) + shift) * _ratio(size, out, scale)
        places = torch.clamp_max(torch.floor(places), size - 1).to(torch.int64)
        x = x.index_select(axis, places)
    return x


def _multiples(x: Tensor, sizes: Sequence[int], scales: Sequence[float | None]) -> bool:
    """Whether every factor is a whole number, and the sizes follow from it."""
    olds = x.shape[x.dim() - len(sizes) :]
    return all(
        new % old == 0 and (scale is None or scale == new // old)
        for old, new, scale in zip(olds, sizes, scales, strict=True)
    )


def _proportional(x: Tensor, sizes: Sequence[int], scales: Sequence[float | None]) -> bool:
    """Whether the scales are those of the sizes."""
    olds = x.shape[x.dim() - len(sizes) :]
    return all(
        scale is None or abs(scale * old - new) < 1e-6 * new
        for old, new, scale in zip(olds, sizes, scales, strict=True)
    )


def nearest(x: Tensor, sizes: Sequence[int], *scales: float | None) -> Any:
    """The element at or before the place; left alone for whole factors of both axes."""
    scales = scales or (None,) * len(sizes)
    if len(sizes) == 2 and _multiples(x, sizes, scales):
        return NotImplemented
    return _nearest(x, sizes, scales, 0.0)


def nearest_exact(x: Tensor, sizes: Sequence[int], *scales: float | None) -> Tensor:
    """The element nearest to the centre."""
    scales = scales or (None,) * len(sizes)
    return _nearest(x, sizes, scales, 0.5)


def linear(x: Tensor, sizes: Sequence[int], aligned: bool, *scales: float | None) -> Tensor:
    """Along the last axis."""
    return _interpolated(x, sizes, scales or [None], aligned, _tent, 1)


def bilinear(x: Tensor, sizes: Sequence[int], aligned: bool, *scales: float | None) -> Any:
    """Along the last two axes; left alone where the scales are those of the sizes."""
    given = scales or (None, None)
    if _proportional(x, sizes, given) or aligned:
        return NotImplemented
    return _interpolated(x, sizes, given, aligned, _tent, 1)


def trilinear(x: Tensor, sizes: Sequence[int], aligned: bool, *scales: float | None) -> Tensor:
    """Along the last three axes."""
    return _interpolated(x, sizes, scales or [None] * 3, aligned, _tent, 1)


def bicubic(x: Tensor, sizes: Sequence[int], aligned: bool, *scales: float | None) -> Tensor:
    """Along the last two axes."""
    return _interpolated(x, sizes, scales or (None, None), aligned, _cubic(-0.75), 2)


def bilinear_antialiased(
    x: Tensor, sizes: Sequence[int], aligned: bool, *scales: float | None
) -> Tensor:
    """Along the last two axes, averaging what shrinks."""
    return _antialiased(x, sizes, scales or (None, None), aligned, _tent, 1)


def bicubic_antialiased(
    x: Tensor, sizes: Sequence[int], aligned: bool, *scales: float | None
) -> Tensor:
    """Along the last two axes, averaging what shrinks."""
    return _antialiased(x, sizes, scales or (None, None), aligned, _cubic(-0.5), 2)
