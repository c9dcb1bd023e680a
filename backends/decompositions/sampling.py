"""Sampling of images at given places, in gathers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["grid_sample"]

_BILINEAR, _NEAREST, _BICUBIC = 0, 1, 2
_ZEROS, _BORDER, _REFLECTION = 0, 1, 2


def grid_sample(x: Tensor, grid: Tensor, mode: int, padding: int, aligned: bool) -> Tensor:
    """Images of two or three axes at places of -1 to 1, by any interpolation and padding."""
    sizes = list(x.shape[2:])
    places = [_unnormalized(grid[..., i], size, aligned) for i, size in enumerate(reversed(sizes))][
        ::-1
    ]
    if mode != _BICUBIC:
        pairs = zip(places, sizes, strict=True)
        places = [_inside(place, size, padding, aligned) for place, size in pairs]
    taps = [_taps(place, mode) for place in places]
    total = None
    for corner in itertools.product(*taps):
        weight: Any = None
        for _, part in corner:
            weight = part if weight is None else weight if part is None else weight * part
        cells = [cell for cell, _ in corner]
        if mode == _BICUBIC:
            pairs = zip(cells, sizes, strict=True)
            cells = [_inside(cell, size, padding, aligned) for cell, size in pairs]
        value = _picked(x, cells)
        value = value if weight is None else value * weight.unsqueeze(1)
        total = value if total is None else total + value
    assert total is not None
    return total


def _unnormalized(place: Tensor, size: int, aligned: bool) -> Tensor:
    if aligned:
        return (place + 1) * ((size - 1) / 2)
    return ((place + 1) * size - 1) / 2


def _inside(place: Tensor, size: int, padding: int, aligned: bool) -> Tensor:
    if padding == _ZEROS:
        return place
    if padding == _REFLECTION:
        low, high = (0.0, size - 1.0) if aligned else (-0.5, size - 0.5)
        place = _reflected(place, low, high)
    return torch.clamp(place, 0.0, size - 1.0)


def _reflected(place: Tensor, low: float, high: float) -> Tensor:
    span = high - low
    if span == 0:
        return torch.zeros_like(place)
    away = (place - low).abs()
    turns = torch.floor(away / span)
    rest = away - turns * span
    odd = turns - 2 * torch.floor(turns / 2)
    return torch.where(odd == 0, rest + low, high - rest)


def _taps(place: Tensor, mode: int) -> list[tuple[Tensor, Tensor | None]]:
    """Cells that a place reads along an axis, and their weights."""
    if mode == _NEAREST:
        return [(torch.round(place), None)]
    low = torch.floor(place)
    part = place - low
    if mode == _BILINEAR:
        return [(low, 1 - part), (low + 1, part)]
    return [(low + step, _cubic(part - step)) for step in range(-1, 3)]


def _cubic(distance: Tensor, a: float = -0.75) -> Tensor:
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return torch.where(d <= 1, near, far)


def _picked(x: Tensor, cells: list[Tensor]) -> Tensor:
    """Elements at whole places, zero outside."""
    sizes = x.shape[2:]
    valid, flat = None, None
    for cell, size in zip(cells, sizes, strict=True):
        inside = (cell >= 0) & (cell <= size - 1)
        valid = inside if valid is None else valid & inside
        index = torch.clamp(cell, 0, size - 1).to(torch.int64)
        flat = index if flat is None else flat * size + index
    assert valid is not None
    assert flat is not None
    n, channels = x.shape[:2]
    rows = flat.reshape(n, 1, -1).expand(n, channels, flat[0].numel())
    values = torch.gather(x.reshape(n, channels, math.prod(sizes)), 2, rows)
    values = values.reshape([n, channels, *flat.shape[1:]])
    return torch.where(valid.unsqueeze(1), values, torch.zeros_like(values))
