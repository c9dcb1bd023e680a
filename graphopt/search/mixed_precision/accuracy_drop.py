"""The smallest recipe whose score stays above a floor: bisection on the front, with real evaluations."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import InfeasibleError
from graphopt.search.mixed_precision.choose import every_recipe
from graphopt.search.mixed_precision.measurements import Measurements
from graphopt.search.mixed_precision.recipe import Recipe

__all__ = ["Scores", "drop_and_error", "within_drop"]

_log = logging.getLogger(__name__)
_QUANTILE = 1.645  # one-sided 95 %
Scores = float | Tensor


def drop_and_error(before: Any, after: Any) -> tuple[float, float]:
    """By how much a score has fallen, and the standard error of that.

    Args:
        before: Score of the uncompressed model: a number, or one number per sample.
        after: That of the compressed one, on the same samples. Paired differences have a much
            smaller error than two independent means: for right and wrong answers it is
            `√(n01 + n10) / n`.

    Returns:
        Mean drop, and its standard error (0 for single numbers).
    """
    first, second = torch.as_tensor(before).double(), torch.as_tensor(after).double()
    change = (first - second).reshape(-1)
    if change.numel() < 2:
        return float(change.mean()), 0.0
    return float(change.mean()), float(change.std(unbiased=True)) / math.sqrt(change.numel())


def within_drop(
    table: Measurements,
    max_drop: float,
    evaluate: Callable[[Any], Scores],
    apply: Callable[[Recipe], Any],
    pin: Mapping[str, str] | None = None,
    *,
    keep: bool = True,
) -> Recipe:
    """The smallest recipe of the front whose drop is certainly at most `max_drop`.

    Args:
        table: Measurements.
        max_drop: Largest drop of the score.
        evaluate: Module → score, larger is better, or one score per sample.
        apply: Recipe → compressed module.
        pin: As for `SensitivityTable.recipe`.
        keep: As for `SensitivityTable.recipe`.

    Raises:
        InfeasibleError: Even the largest recipe falls by more.
    """
    recipes = every_recipe(table, pin, keep=keep)
    reference = evaluate(table.program.module())
    known: dict[int, tuple[float, float]] = {}

    def accepted(place: int) -> bool:
        if place not in known:
            known[place] = drop_and_error(reference, evaluate(apply(recipes[place])))
            _log.info(
                "%.3f bits per weight: drop %.4g ± %.2g",
                recipes[place].bits_per_weight,
                *known[place],
            )
        drop, error = known[place]
        return drop + _QUANTILE * error <= max_drop

    low, high = -1, len(recipes) - 1
    if not accepted(high):
        drop, error = known[high]
        raise InfeasibleError(
            f"even the largest recipe, {recipes[high].bits_per_weight:.3f} bits per weight, falls by"
            f" {drop:.4g} ± {error:.2g}, above max_drop={max_drop:g}; add larger candidates, or"
            " evaluate on more samples"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if accepted(middle):
            high = middle
        else:
            low = middle
    return recipes[high]
