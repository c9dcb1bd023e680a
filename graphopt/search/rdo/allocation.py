"""Bits of every layer from losses, sizes and one λ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.search.mixed_precision.solvers import Problem, solve_exactly

__all__ = ["Allocation", "Rates", "allocate"]

Rates = Mapping[str, Mapping[str, float]]  # layer → candidate → number
_HALVINGS = 100


@dataclass(frozen=True)
class Allocation:
    """A candidate for every layer.

    Attributes:
        choice: Layer → candidate.
        rate_weight: λ: every choice minimises loss + λ · bits of its layer, but for those that use up
            what is left of a budget.
        loss: Sum of the losses.
        bits: Sum of the bits.
        bound: No choice within the budget has a smaller loss than this.

    Examples:
        >>> from graphopt.rdo import allocate
        >>> losses = {"a": {"2": 0.9, "4": 0.1}, "b": {"2": 0.5, "4": 0.2}}
        >>> bits = {"a": {"2": 2.0, "4": 4.0}, "b": {"2": 2.0, "4": 4.0}}
        >>> found = allocate(losses, bits, budget=6.0, rate_weight=None)
        >>> isinstance(found, Allocation), found.choice, found.bits
        (True, {'a': '4', 'b': '2'}, 6.0)
    """

    choice: dict[str, str]
    rate_weight: float
    loss: float
    bits: float
    bound: float


def allocate(
    losses: Rates, bits: Rates, *, budget: float | None, rate_weight: float | None
) -> Allocation:
    """Choose by a given λ, or by the λ that meets a budget.

    λ is found by bisection. What it leaves of the budget is used up by the exact knapsack
    (`graphopt.mixed_precision.solve_exactly`).

    Args:
        losses: What each candidate of each layer costs at the outputs.
        bits: What it takes.
        budget: Bits of all layers together, or None.
        rate_weight: λ, or None.

    Raises:
        InfeasibleError: Even the smallest choice is above the budget; the message has the range.

    Examples:
        >>> losses = {"a": {"2": 0.9, "4": 0.1}, "b": {"2": 0.5, "4": 0.2}}
        >>> bits = {"a": {"2": 2.0, "4": 4.0}, "b": {"2": 2.0, "4": 4.0}}
        >>> allocate(losses, bits, budget=6.0, rate_weight=None).choice
        {'a': '4', 'b': '2'}
    """
    layers = list(losses)
    names = [list(losses[layer]) for layer in layers]
    problem = Problem.of(
        [[losses[layer][name] for name in own] for layer, own in zip(layers, names, strict=True)],
        [[bits[layer][name] for name in own] for layer, own in zip(layers, names, strict=True)],
    )
    if budget is None:
        weight = 0.0 if rate_weight is None else rate_weight
        choice: Sequence[int] = _best(problem, weight)
        loss, size = problem.value(choice)
        bound = loss
    else:
        solved = solve_exactly(problem, budget)
        choice, loss, size, bound = solved.choice, solved.loss, solved.size, solved.bound
        weight = _weight_for(problem, budget)
    chosen = {layer: own[place] for layer, own, place in zip(layers, names, choice, strict=True)}
    return Allocation(chosen, weight, loss, size, bound)


def _best(problem: Problem, weight: float) -> list[int]:
    choice = []
    for layer, (loss, size) in enumerate(zip(problem.losses, problem.sizes, strict=True)):
        usable = problem.usable(layer)
        choice.append(int(usable[np.argmin(loss[usable] + weight * size[usable])]))
    return choice


def _weight_for(problem: Problem, budget: float) -> float:
    """The smallest λ whose choice is within a budget."""
    if problem.value(_best(problem, 0.0))[1] <= budget:
        return 0.0
    low, high = 0.0, 1e-12
    while problem.value(_best(problem, high))[1] > budget and high < 1e12:
        low, high = high, 4 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if problem.value(_best(problem, middle))[1] > budget:
            low = middle
        else:
            high = middle
    return high
