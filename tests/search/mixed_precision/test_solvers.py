"""Solvers of the allocation against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import InfeasibleError
from graphopt.mixed_precision import (
    Problem,
    front,
    solve_exactly,
    solve_greedily,
    solve_on_hull,
)


def random_problem(seed: int, layers: int, candidates: int) -> Problem:
    rng = np.random.default_rng(seed)
    sizes = np.sort(rng.integers(1, 1000, (layers, candidates)), axis=1).astype(float)
    losses = -np.sort(-rng.lognormal(0, 2, (layers, candidates)), axis=1)
    return Problem.of(losses.tolist(), sizes.tolist())


def brute_force(problem: Problem, budget: float) -> float | None:
    found = [
        problem.value(choice)
        for choice in itertools.product(*(range(len(each)) for each in problem.losses))
    ]
    return min((loss for loss, size in found if size <= budget), default=None)


@pytest.mark.integration
@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.floats(0.0, 1.0))
def test_exact_solution_is_the_best_of_all_choices(
    seed: int, layers: int, candidates: int, share: float
) -> None:
    problem = random_problem(seed, layers, candidates)
    low = sum(each.min() for each in problem.sizes)
    high = sum(each.max() for each in problem.sizes)
    budget = float(low + share * (high - low))
    best = brute_force(problem, budget)
    assert best is not None
    for solve in (solve_exactly, solve_on_hull):
        found = solve(problem, budget)
        assert found.size <= budget
        assert problem.value(found.choice) == pytest.approx((found.loss, found.size))
        assert found.bound <= best * (1 + 1e-6) + 1e-9
        assert found.loss >= best * (1 - 1e-9)
    assert solve_exactly(problem, budget).loss <= best * (1 + 1e-5)


@pytest.mark.parametrize("short", [1e-12, 1e-7, 1e-3, 1.0])
def test_choice_just_above_the_budget_is_not_taken_and_the_next_one_is(short: float) -> None:
    # the solver behind it lets a constraint be exceeded by some 1e-6
    losses = [[6.1, 3.2, 2.4, 0.3], [3.0, 2.1, 1.8, 1.1]]
    sizes = [[473.0, 512.0, 755.0, 950.0], [35.0, 145.0, 823.0, 948.0]]
    problem = Problem.of(losses, sizes)
    budget = 1898.0 * (1 - 1e-16) - short
    found = solve_exactly(problem, budget)
    assert found.choice == (3, 2)
    assert found.bound <= found.loss == pytest.approx(brute_force(problem, budget))


def test_every_choice_of_the_front_is_the_best_of_its_size() -> None:
    problem = random_problem(3, 4, 4)
    found = front(problem)
    assert [each.size for each in found] == sorted(each.size for each in found)
    for each in found:
        assert each.loss == pytest.approx(brute_force(problem, each.size))


def test_candidates_without_a_finite_loss_are_never_chosen() -> None:
    problem = Problem.of([[np.nan, 2.0], [np.inf, 1.0]], [[1, 2], [1, 2]])
    assert solve_exactly(problem, 10).choice == (1, 1)
    with pytest.raises(InfeasibleError, match="layer 0"):
        solve_exactly(Problem.of([[np.nan]], [[1]]), 10)


def test_budgets_that_are_too_small_are_refused_with_the_range() -> None:
    problem = Problem.of([[3, 1], [3, 1]], [[4, 8], [4, 8]])
    with pytest.raises(InfeasibleError, match="attainable are 8 to 16"):
        solve_exactly(problem, 7)


def test_greedy_walk_overrides_earlier_choices_and_stops_at_the_budget() -> None:
    scores = [[10.0, 30.0, 50.0], [20.0, 40.0, 60.0], [1.0, 2.0, 3.0]]
    sizes = [[2.0, 4.0, 6.0]] * 3
    kept = [16.0] * 3
    # 60 and 50 dB come first, then 40 (layer 1), 30 (layer 0), 20, 10, and 3 (layer 2)
    assert solve_greedily(scores, sizes, kept, 28.0) == (2, 2, None)
    assert solve_greedily(scores, sizes, kept, 26.0) == (2, 1, None)
    assert solve_greedily(scores, sizes, kept, 12.0) == (0, 0, 2)
    with pytest.raises(InfeasibleError, match="ends at 6 bits"):
        solve_greedily(scores, sizes, kept, 5.0)


@pytest.mark.integration
@pytest.mark.parametrize(("layers", "limit"), [(100, 5.0), (2000, 60.0)])
def test_large_problems_are_solved_within_a_small_gap(layers: int, limit: float) -> None:
    problem = random_problem(0, layers, 8)
    budget = 0.5 * sum(float(each.max()) for each in problem.sizes)
    found = solve_exactly(problem, budget, seconds=limit)
    assert found.size <= budget
    assert found.loss <= solve_on_hull(problem, budget).loss
    assert found.loss - found.bound <= 1e-3 * found.loss
