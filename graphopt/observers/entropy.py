"""The clipping range that keeps most information (Kullback–Leibler)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from graphopt.numerics.affine import grid_of, scale_limits
from graphopt.observers.base import State, range_seen
from graphopt.observers.histogram import HistogramObserver, bin_centres
from graphopt.specs import QuantizationSpec

__all__ = ["EntropyObserver"]

_RATIOS = tuple(1.0 - 0.01 * step for step in range(80))


@dataclass(frozen=True)
class EntropyObserver(HistogramObserver):
    """Range of least divergence between the clipped histogram and its quantized form.

    For every candidate range the values outside are added to the outermost bins (P); the bins of one
    quantization level then share their mean over those that are not empty (Q); the range with the
    least `Σ P log(P / Q)` is taken. (Migacz, "8-bit Inference with TensorRT", GTC 2017.)
    """

    name: ClassVar[str] = "entropy"

    @override
    def range(self, state: State, spec: QuantizationSpec) -> tuple[Tensor, Tensor]:
        low, high = range_seen(state)
        centres, lows, highs = bin_centres(state), low.clone(), high.clone()
        for group in torch.nonzero(low <= high).flatten().tolist():
            ends = _best(centres[group], state["counts"][group], low[group], high[group], spec)
            lows[group], highs[group] = ends
        return lows, highs


def _best(
    centres: Tensor, counts: Tensor, low: Tensor, high: Tensor, spec: QuantizationSpec
) -> tuple[Tensor, Tensor]:
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scale_limits(spec) == "magnitude":
        reach = torch.maximum(-low, high)
        starts, ends = -reach, reach
    else:
        starts, ends = low, high
    grid = grid_of(spec)
    levels = 2**grid.bits
    ratios = torch.tensor(_RATIOS)
    first, last = (starts * ratios).unsqueeze(1), (ends * ratios).unsqueeze(1)
    inside = (centres >= first) & (centres <= last)
    clipped = counts * inside
    place = torch.arange(centres.numel())
    lowest = torch.where(inside, place, centres.numel()).amin(dim=1)
    highest = torch.where(inside, place, -1).amax(dim=1)
    valid = highest >= lowest
    rows = torch.arange(len(_RATIOS))
    lowest, highest = lowest.clamp(max=centres.numel() - 1), highest.clamp(min=0)
    clipped[rows, lowest] += (counts * (centres < first)).sum(dim=1)
    clipped[rows, highest] += (counts * (centres > last)).sum(dim=1)
    width = ((last - first) / levels).clamp(min=torch.finfo(torch.float32).tiny)
    level = ((centres - first) / width).to(torch.int64).clamp(0, levels - 1)
    filled = ((counts > 0) & inside).to(torch.float64)
    per_level = torch.zeros(len(_RATIOS), levels, dtype=torch.float64)
    sums = per_level.scatter_add(1, level, counts * inside)
    sizes = per_level.scatter_add(1, level, filled)
    shared = (sums / sizes.clamp(min=1)).gather(1, level) * filled
    p = clipped / clipped.sum(dim=1, keepdim=True).clamp(min=1)
    q = shared / shared.sum(dim=1, keepdim=True).clamp(min=1)
    terms = torch.where(p > 0, p * torch.log(p / q.clamp(min=1e-12)), torch.zeros_like(p))
    divergence = torch.where(
        valid, terms.sum(dim=1), torch.full((len(_RATIOS),), torch.inf, dtype=p.dtype)
    )
    best = int(divergence.argmin())
    ratio = ratios[best]
    return starts * ratio, ends * ratio
