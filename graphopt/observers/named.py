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
    """Base of statistics that tensors seen earlier have a part in.

    Examples:
        >>> from graphopt.quantization.spec import GlobalMinMaxQParamsCalculator
        >>> issubclass(GlobalMinMaxQParamsCalculator, StatefulQParamsCalculatorBase)
        True
    """


class StatelessQParamsCalculatorBase(QParamsCalculatorBase):
    """Base of statistics of each tensor as it comes, without a memory.

    Examples:
        >>> from graphopt.quantization.spec import DynamicQParamsCalculator
        >>> issubclass(DynamicQParamsCalculator, StatelessQParamsCalculatorBase)
        True
    """


class StaticQParamsCalculator(StaticObserver, StatefulQParamsCalculatorBase):
    """The range of the latest tensor.

    Examples:
        >>> calculator = StaticQParamsCalculator()
        >>> state = calculator.init(1)
        >>> for values in ([[0.0, 4.0]], [[0.0, 2.0]]):
        ...     state = calculator.update(state, torch.tensor(values))
        >>> spec = graphopt.specs.QuantizationSpec(qparam_calculator_cls=StaticQParamsCalculator)
        >>> calculator.range(state, spec)
        (tensor([0.]), tensor([2.]))
    """

    stands_for: ClassVar[str] = "static"


class MovingAverageQParamsCalculator(MovingAverageObserver, StatefulQParamsCalculatorBase):
    """An exponential moving average of the ranges.

    Examples:
        >>> calculator = MovingAverageQParamsCalculator(rate=0.5)
        >>> state = calculator.init(1)
        >>> for values in ([[0.0, 4.0]], [[0.0, 2.0]]):
        ...     state = calculator.update(state, torch.tensor(values))
        >>> spec = graphopt.specs.QuantizationSpec(qparam_calculator_cls=MovingAverageQParamsCalculator)
        >>> calculator.range(state, spec)
        (tensor([0.]), tensor([3.]))
    """

    stands_for: ClassVar[str] = "moving_average"


class GlobalMinMaxQParamsCalculator(GlobalMinMaxObserver, StatefulQParamsCalculatorBase):
    """The range of everything seen.

    Examples:
        >>> calculator = GlobalMinMaxQParamsCalculator()
        >>> state = calculator.init(1)
        >>> for values in ([[0.0, 4.0]], [[0.0, 2.0]]):
        ...     state = calculator.update(state, torch.tensor(values))
        >>> spec = graphopt.specs.QuantizationSpec(qparam_calculator_cls=GlobalMinMaxQParamsCalculator)
        >>> calculator.range(state, spec)
        (tensor([0.]), tensor([4.]))
    """

    stands_for: ClassVar[str] = "global_minmax"


class DynamicQParamsCalculator(StaticObserver, StatelessQParamsCalculatorBase):
    """The range of each tensor, found when the model runs.

    Examples:
        >>> calculator = DynamicQParamsCalculator()
        >>> state = calculator.init(1)
        >>> for values in ([[0.0, 4.0]], [[0.0, 2.0]]):
        ...     state = calculator.update(state, torch.tensor(values))
        >>> spec = graphopt.specs.QuantizationSpec(qparam_calculator_cls=DynamicQParamsCalculator)
        >>> calculator.range(state, spec)
        (tensor([0.]), tensor([2.]))
    """

    stands_for: ClassVar[str] = "dynamic"
