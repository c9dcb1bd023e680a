from __future__ import annotations

import itertools

import numpy as np
import pytest

from graphopt.mixed_precision import Problem, solve_near
from graphopt.search.mixed_precision.exchange_search import ExchangeModel


def random_exchange(seed: int, layers: int = 5, candidates: int = 3) -> ExchangeModel:
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((40, layers * candidates))
    vectors += 0.7 * generator.standard_normal((40, 1))  # errors have something in common
    bits = np.tile([2.0, 4.0, 6.0], layers) * np.repeat(
        generator.integers(1, 5, layers), candidates
    )
    vectors *= np.tile([3.0, 1.0, 0.3], layers)
    return ExchangeModel(
        vectors.T @ vectors / 40,
        np.repeat(np.arange(layers), candidates),
        bits,
        0.6 * bits[2::3].sum(),
    )


def states(exchange: ExchangeModel) -> list[np.ndarray]:
    count = int(exchange.layer.max()) + 1
    every = [np.flatnonzero(exchange.layer == layer) for layer in range(count)]
    return [np.array(state) for state in itertools.product(*every)]


def test_changes_of_single_exchanges_are_differences() -> None:
    exchange = random_exchange(0)
    state = np.array([0, 4, 8, 10, 12])
    gain, size = exchange.singles(state)
    for column, layer in enumerate(exchange.layer):
        other = state.copy()
        other[layer] = column
        assert gain[column] == pytest.approx(
            exchange.value(other) - exchange.value(state), abs=1e-12
        )
        assert size[column] == exchange.sizes[other].sum() - exchange.sizes[state].sum()


@pytest.mark.parametrize("seed", range(20))
def test_searches_end_where_no_exchange_of_one_or_two_layers_helps(seed: int) -> None:
    exchange = random_exchange(seed)
    start = np.flatnonzero(np.arange(15) % 3 == 0)
    found = exchange.search(start)
    assert exchange.sizes[found].sum() <= exchange.budget
    for state in states(exchange):
        differs = int((state != found).sum())
        if differs == 1 and exchange.sizes[state].sum() <= exchange.budget:
            assert exchange.value(state) >= exchange.value(found) - 1e-12


def test_searches_from_several_starts_mostly_find_the_optimum() -> None:
    hits = 0
    for seed in range(20):
        exchange = random_exchange(seed)
        generator = np.random.default_rng(seed)
        start = np.flatnonzero(np.arange(15) % 3 == 0)
        starts = [start, *(exchange.perturbed(start, 0.5, generator) for _ in range(6))]
        found = min(exchange.value(exchange.search(each)) for each in starts)
        best = min(
            exchange.value(state)
            for state in states(exchange)
            if exchange.sizes[state].sum() <= exchange.budget
        )
        hits += found <= best * (1 + 1e-9)
        assert found <= 1.25 * best
    assert hits >= 16


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("changes", [0, 1, 3])
def test_choices_near_another_are_optimal_among_those(seed: int, changes: int) -> None:
    generator = np.random.default_rng(seed)
    problem = Problem.of(
        generator.standard_normal((4, 3)).tolist(), generator.integers(1, 9, (4, 3)).tolist()
    )
    choice = [int(each) for each in generator.integers(0, 3, 4)]
    budget = problem.value(choice)[1] + 2
    every = [
        (problem.value(other)[0], other)
        for other in itertools.product(range(3), repeat=4)
        if sum(a != b for a, b in zip(choice, other, strict=True)) <= changes
        and problem.value(other)[1] <= budget
    ]
    found = solve_near(problem, budget, choice, changes)
    assert found is not None
    assert found.loss == pytest.approx(min(every)[0])
    assert found.size <= budget
    assert sum(a != b for a, b in zip(choice, found.choice, strict=True)) <= changes
