"""Products of which a few cases run by default and the others with `make test-slow`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from graphopt.backends.registry import targets

__all__ = ["cases", "some"]

EXTRAS = tuple(target.value for target in targets() if target.extra)


def cases(*axes: Iterable[Any], default: Callable[..., bool]) -> list[Any]:
    """Every combination of the axes as a parameter set.

    Args:
        axes: Values of each argument, targets by name.
        default: Whether a combination runs by default; the others are marked slow. A target that
            needs an extra marks its combinations with it.
    """
    made = []
    for values in itertools.product(*axes):
        marks = [getattr(pytest.mark, name) for name in EXTRAS if name in values]
        if not default(*values):
            marks.append(pytest.mark.slow)
        made.append(pytest.param(*values, marks=marks))
    assert any(pytest.mark.slow not in each.marks for each in made), "nothing runs by default"
    return made


def some(values: Iterable[Any], default: Callable[[Any], bool]) -> list[Any]:
    """Values as parameter sets, marked slow where `default` says no."""
    return [
        pytest.param(value, marks=[] if default(value) else [pytest.mark.slow]) for value in values
    ]
