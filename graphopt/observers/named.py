"""coreai-opt's classes of range statistics; in a spec they stand for the names that files use."""

from __future__ import annotations

from typing import ClassVar

from graphopt.observers.global_minmax import GlobalMinMaxObserver
from graphopt.observers.moving_average import MovingAverageObserver
from graphopt.observers.running import QParamsCalculatorBase
from graphopt.observers.static import StaticObserver

__all__ = [
    "DynamicQParamsCalculator",
    "GlobalMinMaxQParamsCalculator",
    "MovingAverageQParamsCalculator",
    "StatefulQParamsCalculatorBase",
    "StatelessQParamsCalculatorBase",
    "StaticQParamsCalculator",
]


class StatefulQParamsCalculatorBase(QParamsCalculatorBase):
    """Base of statistics that tensors seen earlier have a part in."""


class StatelessQParamsCalculatorBase(QParamsCalculatorBase):
    """Base of statistics of each tensor as it comes, without a memory."""


class StaticQParamsCalculator(StaticObserver, StatefulQParamsCalculatorBase):
    """The range of the latest tensor."""

    stands_for: ClassVar[str] = "static"


class MovingAverageQParamsCalculator(MovingAverageObserver, StatefulQParamsCalculatorBase):
    """An exponential moving average of the ranges."""

    stands_for: ClassVar[str] = "moving_average"


class GlobalMinMaxQParamsCalculator(GlobalMinMaxObserver, StatefulQParamsCalculatorBase):
    """The range of everything seen."""

    stands_for: ClassVar[str] = "global_minmax"


class DynamicQParamsCalculator(StaticObserver, StatelessQParamsCalculatorBase):
    """The range of each tensor, found when the model runs."""

    stands_for: ClassVar[str] = "dynamic"
