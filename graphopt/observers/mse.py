"""The clipping range of least squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from graphopt.numerics.clipping import clip_by_weight
from graphopt.observers.base import State, range_seen
from graphopt.observers.histogram import HistogramObserver, bin_centres
from graphopt.specs import QuantizationSpec

__all__ = ["MSEObserver"]


@dataclass(frozen=True)
class MSEObserver(HistogramObserver):
    """Range whose rounding and clipping errors on the histogram have the least sum of squares.

    Attributes:
        exponent: Power of the errors that is summed.

    Examples:
        >>> observer = MSEObserver()
        >>> spec = graphopt.quantization.QuantizationSpec(dtype="int8")
        >>> state = observer.update(observer.init(1), torch.linspace(-1, 1, 1001)[None])
        >>> low, high = observer.range(state, spec)
        >>> low.shape, bool(0.9 < high <= 1.01)
        (torch.Size([1]), True)
    """

    name: ClassVar[str] = "mse"
    exponent: float = 2.0

    @override
    def range(self, state: State, spec: QuantizationSpec) -> tuple[Tensor, Tensor]:
        low, high = range_seen(state)
        centres, lows, highs = bin_centres(state), low.clone(), high.clone()
        for group in torch.nonzero(low <= high).flatten().tolist():
            counts = state["counts"][group]
            ends = clip_by_weight(
                centres[group], counts, low[group], high[group], spec, self.exponent
            )
            lows[group], highs[group] = ends
        return lows, highs
