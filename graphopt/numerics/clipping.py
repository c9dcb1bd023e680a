"""Clipping ranges of least squared error: for weights on their values, for statistics on histograms."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from graphopt.extras import deferred
from graphopt.numerics.affine import (
    SMALLEST_SCALE,
    dequantize,
    grid_of,
    has_whole_offsets,
    qparams,
    quantize,
    scale_limits,
)
from graphopt.numerics.parallel import map_tasks
from graphopt.specs import QuantizationSpec

if TYPE_CHECKING:
    from graphopt.numerics import kernels_clipping as kernels
else:
    kernels = deferred("graphopt.numerics.kernels_clipping")

__all__ = ["clip_by_value", "clip_by_weight"]

_CHUNK = 1 << 22  # elements at a time, so that temporaries stay small beside a model
_TASK = 1 << 18  # elements of one task
_COARSE = tuple(1.0 - 0.025 * step for step in range(30))
_FINE = (-0.02, -0.015, -0.01, -0.005, 0.005, 0.01, 0.015, 0.02)


def _search(
    low: Tensor, high: Tensor, errors: Callable[[Tensor, Tensor], Tensor], *, both: bool
) -> tuple[Tensor, Tensor]:
    """Shrink ranges where that lowers the error of their groups.

    Both ends shrink together first; where they count separately each end is then tried alone, and
    last comes a finer grid around the best.

    Args:
        low: Lower ends, [groups].
        high: Upper ends, [groups].
        errors: Errors of several ranges for each group, [candidates, groups] each way.
        both: Whether the ends count separately.
    """
    coarse = torch.tensor(_COARSE, device=low.device).unsqueeze(1).expand(-1, low.shape[0])
    fine = torch.tensor(_FINE, device=low.device).unsqueeze(1)
    best = torch.full_like(low, torch.inf)
    ends = [torch.ones_like(low), torch.ones_like(high)]

    def attempt(first: Tensor, second: Tensor) -> None:
        nonlocal best
        error, place = errors(low * first, high * second).min(dim=0)
        better = error < best
        best = torch.where(better, error, best)
        chosen = place.unsqueeze(0)
        ends[0] = torch.where(better, first.gather(0, chosen).squeeze(0), ends[0])
        ends[1] = torch.where(better, second.gather(0, chosen).squeeze(0), ends[1])

    attempt(coarse, coarse)
    if both:
        attempt(coarse, ends[1].expand_as(coarse))
        attempt(ends[0].expand_as(coarse), coarse)
    near = [(end + fine).clamp(max=1.0) for end in ends]
    attempt(*near)
    if both:
        attempt((ends[0] + fine).clamp(max=1.0), ends[1].expand(len(_FINE), -1))
        attempt(ends[0].expand(len(_FINE), -1), (ends[1] + fine).clamp(max=1.0))
    return low * ends[0], high * ends[1]


def clip_by_value(
    groups: Tensor, spec: QuantizationSpec, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Range of each group that minimises `Σ weight · (w − ŵ)²`.

    Args:
        groups: [groups, elements].
        spec: Element type and scheme.
        weights: What each element's error counts, of the same shape; None is 1.

    Returns:
        Lower and upper ends, [groups].
    """
    both = scale_limits(spec) == "both"
    if groups.device.type == "cpu" and _is_compiled(spec):
        return _clip_compiled(groups.to(torch.float32), spec, weights)
    rows = max(1, _CHUNK // max(groups.shape[1], 1))
    lows, highs = [], []
    for start in range(0, groups.shape[0], rows):
        part = groups[start : start + rows].to(torch.float32)
        counts = None if weights is None else weights[start : start + rows].to(torch.float32)

        def errors(
            lows: Tensor, highs: Tensor, part: Tensor = part, counts: Tensor | None = counts
        ) -> Tensor:
            totals = []
            for a, b in zip(lows, highs, strict=True):
                squared = _squared_error(part, a, b, spec)
                totals.append((squared if counts is None else squared.mul_(counts)).sum(dim=1))
            return torch.stack(totals)

        ends = _search(*_ends(part), errors, both=both)
        lows.append(ends[0])
        highs.append(ends[1])
    return torch.cat(lows), torch.cat(highs)


def _is_compiled(spec: QuantizationSpec) -> bool:
    powers = spec.scale_dtype is not None and "e8m0" in str(spec.scale_dtype)
    return not grid_of(spec).is_float and has_whole_offsets(spec) and not powers


def _ends(groups: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(groups, dim=1)
    return low.clamp(max=0), high.clamp(min=0)


def _clip_compiled(
    groups: Tensor, spec: QuantizationSpec, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`clip_by_value` of integers with zero points, a group at a time from the cache."""
    grid, count = grid_of(spec), groups.shape[0]
    values = groups.contiguous().numpy()
    counts = np.ones((1, 1), np.float32)
    if weights is not None:
        counts = weights.to(torch.float32).contiguous().numpy()
    both = scale_limits(spec) == "both"
    middle = 0 if both else grid.middle
    limits = np.array([grid.q_min, grid.q_max, middle, SMALLEST_SCALE, both], np.float32)
    steps = np.array(_COARSE, np.float32), np.array(_FINE, np.float32)
    lows, highs = (end.contiguous().clone() for end in _ends(groups))
    ends = lows.numpy(), highs.numpy()
    share = max(1, _TASK // max(groups.shape[1], 1))

    def run(start: int) -> None:
        span = start, min(start + share, count)
        kernels.shrink_ranges(values, counts, steps, limits, span, *ends)

    for _ in map_tasks(run, range(0, count, share)):
        pass
    return lows, highs


def _squared_error(values: Tensor, low: Tensor, high: Tensor, spec: QuantizationSpec) -> Tensor:
    scale, offset = qparams(low, high, spec)
    scale = scale.unsqueeze(1)
    offset = None if offset is None else offset.unsqueeze(1)
    stored = quantize(values, scale, offset, grid_of(spec), whole=has_whole_offsets(spec))
    rounded = dequantize(stored, scale, offset)
    return (values - rounded).square_()


def clip_by_weight(
    centres: Tensor,
    weights: Tensor,
    low: Tensor,
    high: Tensor,
    spec: QuantizationSpec,
    exponent: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Range of one histogram that minimises `Σ weight · |x − x̂|^exponent`.

    Args:
        centres: Middle of each bin, [bins].
        weights: Values in each bin, [bins].
        low: Smallest value, a scalar.
        high: Largest value, a scalar.
        spec: Element type and scheme.
        exponent: 2 for the squared error; a larger one clips less.

    Returns:
        Lower and upper end, scalars.
    """
    filled = weights > 0
    values, weights = centres[filled].to(torch.float32), weights[filled].to(torch.float32)

    def errors(lows: Tensor, highs: Tensor) -> Tensor:
        points = values.unsqueeze(0).expand(lows.shape[0], -1)
        squared = _squared_error(points, lows[:, 0], highs[:, 0], spec)
        powers = squared if exponent == 2.0 else squared ** (exponent / 2)
        return (powers * weights).sum(dim=1, keepdim=True)

    ends = low.clamp(max=0).reshape(1), high.clamp(min=0).reshape(1)
    range_ = _search(*ends, errors, both=scale_limits(spec) == "both")
    return range_[0][0], range_[1][0]
