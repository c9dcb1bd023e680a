"""The range of the latest tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from graphopt.observers.base import Observer, State, both_ends, empty_range
from graphopt.specs import QuantizationSpec

__all__ = ["StaticObserver"]


@dataclass(frozen=True)
class StaticObserver(Observer):
    """Minimum and maximum of the tensor that came last.

    Examples:
        >>> observer = StaticObserver()
        >>> state = observer.update(observer.init(1), torch.tensor([[-1.0, 3.0]]))
        >>> low, high = observer.range(state, graphopt.quantization.QuantizationSpec())
        >>> low.item(), high.item()
        (-1.0, 3.0)
    """

    name: ClassVar[str] = "static"
    order_matters: ClassVar[bool] = True

    @override
    def init(self, groups: int) -> State:
        return {"low": empty_range(groups), "high": empty_range(groups)}

    @override
    def update(self, state: State, values: Tensor) -> State:
        if values.numel() == 0:
            return state
        low, high = both_ends(values)
        return {"low": low, "high": high}

    @override
    def range(self, state: State, spec: QuantizationSpec) -> tuple[Tensor, Tensor]:
        return state["low"], state["high"]
