"""Observer: a statistic of ranges as a pure reduction with constant state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.specs import QuantizationSpec

__all__ = ["Observer", "State", "both_ends", "empty_range", "range_seen"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class Observer(ABC):
    """How ranges are found from the tensors that pass.

    `init` → `update` for each tensor → `range`. States are dictionaries of tensors whose shapes do
    not depend on how much was seen; `update` leaves its argument as it is.

    Attributes:
        name: What `QuantizationSpec.qparam_calculator_cls` calls it.
        order_matters: Whether the range depends on the order of the tensors.
        costly: Whether `range` is a search, too slow for every training step.

    Examples:
        >>> from graphopt.observers import OBSERVERS
        >>> all(issubclass(observer, Observer) for observer in OBSERVERS)
        True
    """

    name: ClassVar[str]
    order_matters: ClassVar[bool] = False
    costly: ClassVar[bool] = False

    @abstractmethod
    def init(self, groups: int) -> State:
        """The state of `groups` scales that have seen nothing."""

    @abstractmethod
    def update(self, state: State, values: Tensor) -> State:
        """The state after `values`, [groups, elements], float; no elements change nothing."""

    @abstractmethod
    def range(self, state: State, spec: QuantizationSpec) -> tuple[Tensor, Tensor]:
        """Lower and upper ends, float32 [groups]; NaN where nothing, or a NaN or Inf, was seen."""


def both_ends(values: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each group, float32; NaN where a value is not finite."""
    low, high = torch.aminmax(values, dim=1) if values.shape[0] > 1 else _of_one(values)
    low, high = low.to(torch.float32), high.to(torch.float32)
    fine = torch.isfinite(low) & torch.isfinite(high)
    nothing = torch.full_like(low, torch.nan)
    return torch.where(fine, low, nothing), torch.where(fine, high, nothing)


def _of_one(values: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(values)
    return low.reshape(1), high.reshape(1)


def range_seen(state: State) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of a state that keeps both; NaN where there is none."""
    # false for NaN as for the ends of an empty range
    seen = state["low"] <= state["high"]
    nothing = torch.full_like(state["low"], torch.nan)
    return torch.where(seen, state["low"], nothing), torch.where(seen, state["high"], nothing)


def empty_range(groups: int) -> Tensor:
    """One end of a range that has seen nothing."""
    return torch.full((groups,), torch.nan)
