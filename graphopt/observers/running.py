"""Range statistics in coreai-opt's form: one method says how a running range takes in a new one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from graphopt.observers.base import Observer, State, both_ends, empty_range
from graphopt.specs import QuantizationSpec
from graphopt.specs.quantization import register_calculator

__all__ = ["QParamsCalculatorBase", "RunningRangeMixin"]

KindT = TypeVar("KindT", bound=type)


class QParamsCalculatorBase(Observer):
    """Base of range statistics that specs name by a text.

    Examples:
        >>> from graphopt.observers import observer_of
        >>> from graphopt.quantization.spec import GlobalMinMaxQParamsCalculator
        >>> @QParamsCalculatorBase.register("documented_range")
        ... class Documented(GlobalMinMaxQParamsCalculator):
        ...     pass
        >>> spec = graphopt.quantization.QuantizationSpec(qparam_calculator_cls="documented_range")
        >>> type(observer_of(spec)).__name__
        'Documented'
    """

    name: ClassVar[str] = ""

    @classmethod
    def register(cls, name: str) -> Callable[[KindT], KindT]:
        """Decorator: let `qparam_calculator_cls=name` stand for the class.

        Raises:
            ConfigError: The name is taken.
        """

        def note(kind: KindT) -> KindT:
            register_calculator(name, kind)
            kind.name = name  # type: ignore[attr-defined]
            return kind

        return note


class RunningRangeMixin:
    """Keeps one range, [scales], that `update_running_range` moves; a first tensor starts it.

    Attributes:
        running_min: Lower ends so far, while `update_running_range` runs.
        running_max: Upper ends so far.

    Examples:
        >>> from graphopt.observers import QParamsCalculatorBase
        >>> class Widest(RunningRangeMixin, QParamsCalculatorBase):
        ...     def update_running_range(self, min_val, max_val):
        ...         low = torch.minimum(self.running_min, min_val)
        ...         return low, torch.maximum(self.running_max, max_val)
        >>> widest = Widest()
        >>> state = widest.init(1)
        >>> for values in ([[-1.0, 2.0]], [[-3.0, 0.0]]):
        ...     state = widest.update(state, torch.tensor(values))
        >>> state["low"], state["high"]
        (tensor([-3.]), tensor([2.]))
    """

    running_min: Tensor
    running_max: Tensor

    @abstractmethod
    def update_running_range(self, min_val: Tensor, max_val: Tensor) -> tuple[Tensor, Tensor]:
        """The range after a tensor with these ends, [scales] each."""

    def init(self, groups: int) -> State:
        """Nothing seen."""
        seen = torch.zeros(groups, dtype=torch.bool)
        return {"low": empty_range(groups), "high": empty_range(groups), "seen": seen}

    def update(self, state: State, values: Tensor) -> State:
        """The state after `values`, [scales, elements]."""
        if values.numel() == 0:
            return state
        low, high = both_ends(values)
        if bool(state["seen"].all()):
            self.running_min, self.running_max = state["low"], state["high"]
            low, high = self.update_running_range(low, high)
        return {"low": low, "high": high, "seen": torch.ones_like(state["seen"])}

    def range(self, state: State, spec: QuantizationSpec) -> tuple[Tensor, Tensor]:
        """The range, [scales] each."""
        del spec
        return state["low"], state["high"]
