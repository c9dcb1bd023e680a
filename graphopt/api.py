"""What people call."""

from graphopt.backends.lowering import lower
from graphopt.capture import capture
from graphopt.compressors.joint import compress
from graphopt.moved import moved_name
from graphopt.passes.tune import tune
from graphopt.search.budget.fit import fit

__all__ = ["capture", "compress", "fit", "lower", "tune"]


def __getattr__(name: str) -> object:
    return moved_name(__name__, name)
