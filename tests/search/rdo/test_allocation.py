from __future__ import annotations

import itertools

import numpy as np
import pytest

from graphopt.errors import InfeasibleError
from graphopt.rdo import allocate


def table(
    layers: int, seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Losses that fall fourfold per bit, sizes of layers between 100 and 1000 weights."""
    rng = np.random.default_rng(seed)
    losses, bits = {}, {}
    for number in range(layers):
        size, level = rng.integers(100, 1000), rng.lognormal(0, 1.5)
        losses[f"layer{number}"] = {
            f"int{b}": level * 4.0**-b * rng.uniform(0.8, 1.25) for b in (2, 4, 6)
        }
        bits[f"layer{number}"] = {f"int{b}": float(size * b + 16) for b in (2, 4, 6)}
    return losses, bits


def every_choice(losses: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    names = list(losses)
    options = itertools.product(*(losses[name] for name in names))
    return [dict(zip(names, each, strict=True)) for each in options]


def total(part: dict[str, dict[str, float]], choice: dict[str, str]) -> float:
    return sum(part[name][candidate] for name, candidate in choice.items())


@pytest.mark.parametrize("seed", range(6))
def test_budget_is_met_with_the_least_loss(seed: int) -> None:
    losses, bits = table(5, seed)
    budget = 4.1 * sum(own["int2"] for own in bits.values()) / 2
    found = allocate(losses, bits, budget=budget, rate_weight=None)
    within = [each for each in every_choice(losses) if total(bits, each) <= budget]
    best = min(total(losses, each) for each in within)
    assert found.bits == pytest.approx(total(bits, found.choice))
    assert found.bits <= budget
    assert found.loss == pytest.approx(best, rel=1e-5)
    assert found.bound <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_rate_weight_of_a_budget_gives_choices_within_it(seed: int) -> None:
    losses, bits = table(6, seed)
    budget = 3.7 * sum(own["int2"] for own in bits.values()) / 2
    weight = allocate(losses, bits, budget=budget, rate_weight=None).rate_weight
    chosen = allocate(losses, bits, budget=None, rate_weight=weight)
    assert chosen.bits <= budget
    more = allocate(losses, bits, budget=None, rate_weight=0.99 * weight)
    assert more.bits > budget  # a smaller one would be too generous


@pytest.mark.parametrize("weight", [0.0, 1e-5, 1e-4, 1.0])
def test_given_rate_weight_minimises_loss_and_rate_together(weight: float) -> None:
    losses, bits = table(5, 0)
    found = allocate(losses, bits, budget=None, rate_weight=weight)
    best = min(total(losses, each) + weight * total(bits, each) for each in every_choice(losses))
    assert found.loss + weight * found.bits == pytest.approx(best)
    assert found.rate_weight == weight


def test_generous_budget_needs_no_rate_weight() -> None:
    losses, bits = table(3, 0)
    found = allocate(losses, bits, budget=1e9, rate_weight=None)
    assert found.rate_weight == 0
    assert set(found.choice.values()) == {"int6"}


def test_budget_below_the_smallest_choice_is_refused_with_the_range() -> None:
    losses, bits = table(3, 0)
    with pytest.raises(InfeasibleError, match="attainable are"):
        allocate(losses, bits, budget=10.0, rate_weight=None)
