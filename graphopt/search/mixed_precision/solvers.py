"""Choose one candidate per layer: greedy, by the Lagrangian hull, and exactly.

A problem has one list of candidates per layer, each with a loss (smaller is better) and a size in
bits. Losses add up over layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from graphopt.backends.quiet import silent
from graphopt.errors import InfeasibleError
from graphopt.extras import deferred

if TYPE_CHECKING:
    from scipy import optimize, sparse
else:
    optimize, sparse = deferred("scipy.optimize"), deferred("scipy.sparse")

__all__ = [
    "Problem",
    "Solution",
    "front",
    "solve_exactly",
    "solve_greedily",
    "solve_near",
    "solve_on_hull",
]

_ATTEMPTS = 6  # of branch and bound, where a choice is above the budget by rounding

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """Candidates of every layer.

    Attributes:
        losses: One array per layer, one entry per candidate; NaN and Inf exclude a candidate.
        sizes: Bits of the same candidates.

    Examples:
        >>> Problem.of(losses=[[0.9, 0.1], [0.5, 0.2]], sizes=[[2, 4], [2, 4]]).value([1, 0])
        (0.6, 6.0)
    """

    losses: tuple[Floats, ...]
    sizes: tuple[Floats, ...]

    @classmethod
    def of(cls, losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]]) -> Problem:
        """From nested sequences."""
        return cls(
            tuple(np.asarray(row, dtype=np.float64) for row in losses),
            tuple(np.asarray(row, dtype=np.float64) for row in sizes),
        )

    def usable(self, layer: int) -> npt.NDArray[np.int64]:
        """Candidates of a layer that no other one beats in both, sizes ascending.

        Raises:
            InfeasibleError: No candidate has a finite loss.
        """
        loss, size = self.losses[layer], self.sizes[layer]
        finite = np.flatnonzero(np.isfinite(loss))
        if not len(finite):
            raise InfeasibleError(f"no candidate of layer {layer} has a finite loss")
        order = finite[np.lexsort((loss[finite], size[finite]))]
        best = np.minimum.accumulate(loss[order])
        first = np.r_[True, loss[order][1:] < best[:-1]]
        return order[first].astype(np.int64)

    def value(self, choice: Sequence[int]) -> tuple[float, float]:
        """Loss and size of a choice."""
        loss = sum(float(self.losses[i][c]) for i, c in enumerate(choice))
        return loss, sum(float(self.sizes[i][c]) for i, c in enumerate(choice))


@dataclass(frozen=True)
class Solution:
    """A choice and how good it is.

    Attributes:
        choice: Candidate of each layer.
        loss: Sum of losses.
        size: Sum of sizes, bits.
        bound: No choice within the budget has a smaller loss than this.

    Examples:
        >>> from graphopt.mixed_precision import Problem, solve_exactly
        >>> problem = Problem.of(losses=[[0.9, 0.1], [0.5, 0.2]], sizes=[[2, 4], [2, 4]])
        >>> isinstance(solve_exactly(problem, budget=6), Solution)
        True
    """

    choice: tuple[int, ...]
    loss: float
    size: float
    bound: float


def solve_greedily(
    scores: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[float]],
    kept: Sequence[float],
    budget: float,
) -> tuple[int | None, ...]:
    """The walk of published mixed-precision recipes.

    All (layer, candidate) pairs are sorted by score, best first; each takes the place of the layer's
    choice so far; the walk stops as soon as the budget is met. Layers that are never reached stay
    uncompressed.

    Args:
        scores: Score of every candidate of every layer, larger is better (PSNR in dB).
        sizes: Bits of the same candidates.
        kept: Bits of each layer when it is left uncompressed.
        budget: Bits of all layers together.

    Returns:
        Candidate of each layer, or None where it stays uncompressed.

    Raises:
        InfeasibleError: The list ends before the budget is met.

    Examples:
        >>> solve_greedily([[20, 40], [30, 50]], sizes=[[2, 4], [2, 4]], kept=[32, 32], budget=6)
        (1, 0)
    """
    pairs = [
        (float(score), layer, candidate)
        for layer, row in enumerate(scores)
        for candidate, score in enumerate(row)
        if np.isfinite(score) or score == np.inf
    ]
    pairs.sort(key=lambda pair: -pair[0])
    choice: list[int | None] = [None] * len(scores)
    now = [float(size) for size in kept]
    total = sum(now)
    for _, layer, candidate in pairs:
        if total <= budget:
            break
        total += float(sizes[layer][candidate]) - now[layer]
        now[layer] = float(sizes[layer][candidate])
        choice[layer] = candidate
    if total > budget:
        raise InfeasibleError(
            f"the greedy walk ends at {total:.0f} bits, above the budget of {budget:.0f}"
        )
    return tuple(choice)


@dataclass(frozen=True)
class _Step:
    layer: int
    candidate: int
    gain: float  # loss per bit
    loss: float
    size: float


def _hull_steps(problem: Problem) -> tuple[list[int], list[_Step]]:
    """Cheapest choice of every layer, and the steps up its lower hull, steepest first."""
    start: list[int] = []
    steps: list[_Step] = []
    for layer in range(len(problem.losses)):
        loss, size = problem.losses[layer], problem.sizes[layer]
        hull: list[int] = []
        for candidate in problem.usable(layer):
            while len(hull) > 1:
                a, b = hull[-2], hull[-1]
                left = (loss[a] - loss[b]) * (size[candidate] - size[b])
                if left > (loss[b] - loss[candidate]) * (size[b] - size[a]):
                    break
                hull.pop()
            hull.append(int(candidate))
        start.append(hull[0])
        for a, b in itertools.pairwise(hull):
            drop, rise = float(loss[a] - loss[b]), float(size[b] - size[a])
            steps.append(_Step(layer, b, drop / rise, drop, rise))
    steps.sort(key=lambda step: (-step.gain, step.layer, step.candidate))
    return start, steps


def front(problem: Problem) -> list[Solution]:
    """Choices that are each optimal for their own size, from the smallest to the largest.

    Examples:
        >>> from graphopt.mixed_precision import Problem
        >>> problem = Problem.of(losses=[[0.9, 0.1], [0.5, 0.2]], sizes=[[2, 4], [2, 4]])
        >>> [solution.choice for solution in front(problem)]
        [(0, 0), (1, 0), (1, 1)]
    """
    choice, steps = _hull_steps(problem)
    loss, size = problem.value(choice)
    solutions = [Solution(tuple(choice), loss, size, loss)]
    for step in steps:
        choice[step.layer] = step.candidate
        loss, size = loss - step.loss, size + step.size
        solutions.append(Solution(tuple(choice), loss, size, loss))
    return solutions


def solve_on_hull(problem: Problem, budget: float) -> Solution:
    """The steepest steps up the hulls that fit, and the bound that the next one gives.

    Steps that do not fit are passed over, so that smaller ones may still use the rest.

    Raises:
        InfeasibleError: Even the smallest choice is too large; the message has the range.

    Examples:
        >>> from graphopt.mixed_precision import Problem
        >>> problem = Problem.of(losses=[[0.9, 0.1], [0.5, 0.2]], sizes=[[2, 4], [2, 4]])
        >>> solve_on_hull(problem, budget=7).choice
        (1, 0)
    """
    choice, steps = _hull_steps(problem)
    loss, size = problem.value(choice)
    _require(problem, size, budget)
    bound: float | None = None
    closed: set[int] = set()
    for step in steps:
        if step.layer in closed:
            continue
        if size + step.size > budget:
            if bound is None:
                bound = loss - step.gain * (budget - size)
            closed.add(step.layer)
            continue
        choice[step.layer] = step.candidate
        loss, size = loss - step.loss, size + step.size
    loss, size = problem.value(choice)
    return Solution(tuple(choice), loss, size, loss if bound is None else bound)


def solve_exactly(
    problem: Problem, budget: float, *, gap: float = 1e-6, seconds: float = 60.0
) -> Solution:
    """The multiple-choice knapsack by branch and bound (`scipy.optimize.milp`, HiGHS).

    Args:
        problem: Candidates.
        budget: Bits of all layers together.
        gap: Relative gap at which the search may end.
        seconds: Time after which the best choice so far is taken.

    Raises:
        InfeasibleError: Even the smallest choice is too large; the message has the range.

    Examples:
        >>> from graphopt.mixed_precision import Problem
        >>> problem = Problem.of(losses=[[0.9, 0.1], [0.5, 0.2]], sizes=[[2, 4], [2, 4]])
        >>> solve_exactly(problem, budget=6).choice
        (1, 0)
    """
    start = solve_on_hull(problem, budget)
    pairs = [
        (layer, int(candidate))
        for layer in range(len(problem.losses))
        for candidate in problem.usable(layer)
    ]
    choice, lower = _branch_and_bound(problem, pairs, budget, start.loss, gap, seconds)
    bound = start.bound if lower is None else max(start.bound, lower)
    if choice is None:
        return Solution(start.choice, start.loss, start.size, min(bound, start.loss))
    value, total = problem.value(choice)
    if total > budget or value > start.loss:
        return Solution(start.choice, start.loss, start.size, min(bound, start.loss))
    return Solution(choice, value, total, min(bound, value))


def solve_near(
    problem: Problem, budget: float, choice: Sequence[int], changes: int, *, seconds: float = 60.0
) -> Solution | None:
    """The best choice that differs from a given one in at most `changes` layers.

    Args:
        problem: Candidates; losses may be negative, as changes against the given choice.
        budget: Bits of all layers together.
        choice: The given choice.
        changes: Layers that may differ.
        seconds: Time after which the best choice so far is taken.

    Returns:
        The choice, or None where none was found.

    Examples:
        >>> from graphopt.mixed_precision import Problem
        >>> problem = Problem.of(losses=[[0.9, 0.1], [0.5, 0.2]], sizes=[[2, 4], [2, 4]])
        >>> solve_near(problem, budget=8, choice=(0, 0), changes=1).choice
        (1, 0)
    """
    pairs = [
        (layer, int(candidate))
        for layer in range(len(problem.losses))
        for candidate in np.flatnonzero(np.isfinite(problem.losses[layer]))
    ]
    other = np.array([float(choice[layer] != candidate) for layer, candidate in pairs])
    scale = sum(float(np.ptp(loss[np.isfinite(loss)])) for loss in problem.losses)
    base = sum(float(loss[np.isfinite(loss)].min()) for loss in problem.losses)
    chosen, bound = _branch_and_bound(
        problem, pairs, budget, base + scale, 1e-6, seconds, (other, changes)
    )
    if chosen is None:
        return None
    value, total = problem.value(chosen)
    if total > budget:
        return None
    return Solution(chosen, value, total, value if bound is None else min(bound, value))


def _branch_and_bound(
    problem: Problem,
    pairs: Sequence[tuple[int, int]],
    budget: float,
    level: float,
    gap: float,
    seconds: float,
    limit: tuple[Floats, int] | None = None,
) -> tuple[tuple[int, ...] | None, float | None]:
    """Choice and lower bound of the knapsack over some (layer, candidate) pairs.

    Args:
        problem: Candidates.
        pairs: Those that may be chosen, layer by layer.
        budget: Bits.
        level: A loss that is attained, to scale by.
        gap: Relative gap at which the search may end.
        seconds: Time limit.
        limit: Weight of each pair and the most that chosen ones may weigh.
    """
    layers = np.array([layer for layer, _ in pairs])
    loss = np.array([problem.losses[layer][candidate] for layer, candidate in pairs])
    size = np.array([problem.sizes[layer][candidate] for layer, candidate in pairs])
    # losses above the least are what can be saved: differences keep small ones visible
    first = np.flatnonzero(np.r_[True, np.diff(layers) > 0])
    base, least = np.minimum.reduceat(loss, first), np.minimum.reduceat(size, first)
    scale = max(float(level - base.sum()), 1e-300)
    ones = sparse.csr_array((np.ones(len(pairs)), (layers, np.arange(len(pairs)))))
    slack = budget - float(least.sum())
    above = (size - least[layers]) / max(slack, 1.0)
    constraints = [
        optimize.LinearConstraint(ones, 1.0, 1.0),
        optimize.LinearConstraint(above[None, :], -np.inf, slack / max(slack, 1.0)),
    ]
    if limit is not None:
        constraints.append(optimize.LinearConstraint(limit[0][None, :], -np.inf, limit[1]))
    taken = np.zeros(len(pairs), dtype=bool)
    bound = None
    for attempt in range(_ATTEMPTS):
        with silent():  # HiGHS writes notes of its own to the process's streams
            solved = optimize.milp(
                (loss - base[layers]) / scale,
                constraints=constraints,
                integrality=np.ones(len(pairs)),
                bounds=optimize.Bounds(0, 1),
                options={"mip_rel_gap": gap, "time_limit": seconds},
            )
        if attempt == 0 and solved.mip_dual_bound is not None:
            bound = float(solved.mip_dual_bound) * scale + float(base.sum())
        if solved.x is None:
            return None, bound
        taken = solved.x > 0.5
        if float(size[taken].sum()) <= budget:
            break
        # HiGHS lets a row be exceeded a little: leave out this choice, in the end all that are so near
        constraints.append(
            optimize.LinearConstraint(taken[None, :].astype(float), -np.inf, len(base) - 1)
        )
        if attempt >= _ATTEMPTS // 2:
            constraints[1] = optimize.LinearConstraint(
                above[None, :], -np.inf, slack / max(slack, 1.0) - 2e-6
            )
    choice = [0] * len(base)
    for place in np.flatnonzero(taken):
        layer, candidate = pairs[int(place)]
        choice[layer] = candidate
    return tuple(choice), bound


def _require(problem: Problem, smallest: float, budget: float) -> None:
    if smallest <= budget:
        return
    largest = sum(
        float(problem.sizes[layer][problem.usable(layer)].max())
        for layer in range(len(problem.losses))
    )
    raise InfeasibleError(
        f"the smallest choice takes {smallest:.0f} bits, above the budget of {budget:.0f};"
        f" attainable are {smallest:.0f} to {largest:.0f}"
    )
