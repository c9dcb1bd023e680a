"""RangeCalculatorBase: how the range of a weight is found, as a class that specs name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["MinMaxRangeCalculator", "RangeCalculatorBase"]


class RangeCalculatorBase(ABC):
    """Lower and upper ends of a weight's groups; `range_calculator_cls` takes a subclass.

    >>> class NinetyNinePercent(RangeCalculatorBase):
    ...     def _generate_min_max(self, x):
    ...         ends = x.new_tensor([0.005, 0.995])
    ...         return tuple(torch.quantile(x, ends, dim=1))
    """

    stands_for: ClassVar[str] = ""

    def __call__(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of each group.

        Args:
            groups: [groups, elements], the elements that share a scale in a row.

        Returns:
            Lower and upper ends, [groups] each.
        """
        low, high = self._generate_min_max(groups)
        return low.reshape(len(groups)), high.reshape(len(groups))

    @abstractmethod
    def _generate_min_max(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of [groups, elements], as two tensors of one value a group."""


class MinMaxRangeCalculator(RangeCalculatorBase):
    """Smallest and largest element; as a spec's class it is "minmax".

    Examples:
        >>> low, high = MinMaxRangeCalculator()(torch.tensor([[-1.0, 3.0]]))
        >>> low.item(), high.item()
        (-1.0, 3.0)
    """

    stands_for: ClassVar[str] = "minmax"

    def _generate_min_max(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(x, dim=1)
        return low, high
