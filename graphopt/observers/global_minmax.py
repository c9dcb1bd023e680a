"""The range of everything seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from graphopt.observers.base import Observer, State, both_ends, range_seen
from graphopt.specs import QuantizationSpec

__all__ = ["GlobalMinMaxObserver"]


@dataclass(frozen=True)
class GlobalMinMaxObserver(Observer):
    """Smallest minimum and largest maximum of all tensors.

    Examples:
        >>> observer = GlobalMinMaxObserver()
        >>> state = observer.update(observer.init(1), torch.tensor([[-1.0, 3.0]]))
        >>> low, high = observer.range(state, graphopt.quantization.QuantizationSpec())
        >>> low.item(), high.item()
        (-1.0, 3.0)
    """

    name: ClassVar[str] = "global_minmax"

    @override
    def init(self, groups: int) -> State:
        return {
            "low": torch.full((groups,), torch.inf),
            "high": torch.full((groups,), -torch.inf),
        }

    @override
    def update(self, state: State, values: Tensor) -> State:
        if values.numel() == 0:
            return state
        low, high = both_ends(values)
        # minimum and maximum hand NaN on
        return {
            "low": torch.minimum(state["low"], low),
            "high": torch.maximum(state["high"], high),
        }

    @override
    def range(self, state: State, spec: QuantizationSpec) -> tuple[Tensor, Tensor]:
        return range_seen(state)
