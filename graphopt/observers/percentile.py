"""The range between two percentiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from graphopt.observers.base import State, range_seen
from graphopt.observers.histogram import HistogramObserver, bin_centres
from graphopt.specs import QuantizationSpec

__all__ = ["PercentileObserver"]


@dataclass(frozen=True)
class PercentileObserver(HistogramObserver):
    """Range that leaves out the same share of values at either end.

    Attributes:
        share: Share of the values inside the range, in (0, 1].

    Examples:
        >>> observer = PercentileObserver(share=0.99)
        >>> spec = graphopt.quantization.QuantizationSpec(dtype="int8")
        >>> state = observer.update(observer.init(1), torch.linspace(-1, 1, 1001)[None])
        >>> low, high = observer.range(state, spec)
        >>> low.shape, bool(0.9 < high <= 1.01)
        (torch.Size([1]), True)
    """

    name: ClassVar[str] = "percentile"
    share: float = 0.9999

    @override
    def range(self, state: State, spec: QuantizationSpec) -> tuple[Tensor, Tensor]:
        low, high = range_seen(state)
        centres, counts = bin_centres(state), state["counts"]
        total = counts.sum(dim=1, keepdim=True)
        outside = (1 - self.share) / 2 * total
        half = (centres[:, 1:2] - centres[:, :1]) / 2
        below = counts.cumsum(dim=1)
        first = (below <= outside).sum(dim=1, keepdim=True).clamp(max=counts.shape[1] - 1)
        above = counts.flip(1).cumsum(dim=1)
        last = counts.shape[1] - 1 - (above <= outside).sum(dim=1, keepdim=True)
        lower = (centres.gather(1, first) - half).squeeze(1)
        upper = (centres.gather(1, last.clamp(min=0)) + half).squeeze(1)
        # NaN, where nothing was seen, is handed on
        return torch.maximum(lower, low), torch.minimum(upper, high)
