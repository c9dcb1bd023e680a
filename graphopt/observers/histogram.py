"""Histograms over a range that doubles as needed, for the observers that search a clipping range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from graphopt.observers.base import Observer, State, both_ends

__all__ = ["HistogramObserver", "bin_centres"]

_SIDE = 4096  # bins on either side of zero
_EMPTY = -1000  # exponent of a range that has seen only zeros
_SMALLEST = -126


@dataclass(frozen=True)
class HistogramObserver(Observer):
    """Counts in 8192 equal bins over [−2^e, 2^e], e the exponent of the largest magnitude seen.

    When e grows by k, 2^k bins become one. Bins of all sizes have common edges, so the counts are the
    same in whatever order the tensors come.
    """

    costly: ClassVar[bool] = True

    @override
    def init(self, groups: int) -> State:
        return {
            "counts": torch.zeros(groups, 2 * _SIDE, dtype=torch.float64),
            "exponent": torch.full((groups,), _EMPTY),
            "low": torch.full((groups,), torch.inf),
            "high": torch.full((groups,), -torch.inf),
        }

    @override
    def update(self, state: State, values: Tensor) -> State:
        if values.numel() == 0:
            return state
        low, high = both_ends(values)
        wide = values.detach().to(torch.float32)
        largest = torch.maximum(low.abs(), high.abs())
        fine = torch.isfinite(largest)
        if not bool(fine.all()):
            # NaN ends stay in the state; the counts of such a group are of no use any more
            wide = torch.where(fine.unsqueeze(1), wide, torch.zeros_like(wide))
            largest = torch.where(fine, largest, torch.zeros_like(largest))
        needed = torch.frexp(largest)[1].to(torch.int64).clamp(min=_SMALLEST)
        needed = torch.where(largest > 0, needed, torch.full_like(needed, _EMPTY))
        exponent = torch.maximum(state["exponent"], needed)
        counts = _coarsened(state["counts"], exponent - state["exponent"])
        return {
            "counts": counts + _counted(wide, exponent),
            "exponent": exponent,
            "low": torch.minimum(state["low"], low),
            "high": torch.maximum(state["high"], high),
        }


def bin_centres(state: State) -> Tensor:
    """Middle of every bin, float32 [groups, bins]."""
    places = (torch.arange(2 * _SIDE) - _SIDE + 0.5) / _SIDE
    exponents = state["exponent"].clamp(min=_SMALLEST).unsqueeze(1)
    return torch.ldexp(places.expand(len(exponents), -1), exponents)


def _coarsened(counts: Tensor, steps: Tensor) -> Tensor:
    """Counts after each range has doubled `steps` times."""
    if not bool(steps.any()):
        return counts
    place = torch.arange(2 * _SIDE) - _SIDE
    # an arithmetic shift rounds towards minus infinity, which keeps the two sides apart
    moved = (place.unsqueeze(0) >> steps.clamp(max=20).unsqueeze(1)) + _SIDE
    return torch.zeros_like(counts).scatter_add_(1, moved, counts)


def _counted(values: Tensor, exponent: Tensor) -> Tensor:
    rows = []
    for row, power in zip(values, exponent.tolist(), strict=True):
        if power == _EMPTY:
            count = torch.zeros(2 * _SIDE, dtype=torch.float64)
            count[_SIDE] = row.numel()
        else:
            edge = 2.0**power
            count = torch.histc(row, 2 * _SIDE, -edge, edge).to(torch.float64)
        rows.append(count)
    return torch.stack(rows)
