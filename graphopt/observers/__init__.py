"""Observers: one file each; a new one is added to `OBSERVERS` and the contract test covers it."""

from graphopt.errors import ConfigError
from graphopt.observers.base import Observer, State
from graphopt.observers.entropy import EntropyObserver
from graphopt.observers.global_minmax import GlobalMinMaxObserver
from graphopt.observers.lp import LpObserver
from graphopt.observers.moving_average import MovingAverageObserver
from graphopt.observers.mse import MSEObserver
from graphopt.observers.percentile import PercentileObserver
from graphopt.observers.running import QParamsCalculatorBase, RunningRangeMixin
from graphopt.observers.static import StaticObserver
from graphopt.specs import QuantizationSpec

__all__ = [
    "OBSERVERS",
    "EntropyObserver",
    "GlobalMinMaxObserver",
    "LpObserver",
    "MSEObserver",
    "MovingAverageObserver",
    "Observer",
    "PercentileObserver",
    "QParamsCalculatorBase",
    "RunningRangeMixin",
    "State",
    "StaticObserver",
    "observer_of",
]

OBSERVERS: tuple[type[Observer], ...] = (
    StaticObserver,
    MovingAverageObserver,
    GlobalMinMaxObserver,
    PercentileObserver,
    MSEObserver,
    LpObserver,
    EntropyObserver,
)


def observer_of(spec: QuantizationSpec) -> Observer:
    """The observer of an activation's spec.

    Raises:
        ConfigError: The spec names a class that is no `Observer`.

    Examples:
        >>> observer_of(graphopt.quantization.QuantizationSpec(qparam_calculator_cls="mse"))
        MSEObserver(exponent=2.0)
    """
    wanted = spec.qparam_calculator_cls
    if isinstance(wanted, type):
        if not issubclass(wanted, Observer):
            raise ConfigError(f"qparam_calculator_cls={wanted.__name__} is no subclass of Observer")
        return wanted()
    if wanted == "dynamic":
        return StaticObserver()
    name = "moving_average" if wanted == "default" else wanted
    return next(observer for observer in OBSERVERS if observer.name == name)()
