"""Torch's own op database on every target: right, or refused by name; never wrong, never a crash."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from helpers.op_calls import counted_ops
from helpers.op_sweep import Outcome, sweep, write_table

# share of the calls that come out right, at least
SHARES = {"coreai": 0.9, "coreml": 0.85, "executorch": 0.9, "torch": 0.95}
TARGETS = [
    pytest.param(name, marks=[getattr(pytest.mark, name)] if name != "torch" else [])
    for name in SHARES
]
SAMPLE = counted_ops()[3::10]


def check(target: str, outcomes: list[Outcome]) -> None:
    counts = Counter(outcome.kind for outcome in outcomes)
    lapses = [outcome for outcome in outcomes if outcome.kind not in ("right", "refused")]
    assert not lapses, "\n".join(f"{o.kind}: {o.call}: {o.said}" for o in lapses)
    assert counts["right"] >= SHARES[target] * len(outcomes), counts


@pytest.mark.integration
@pytest.mark.parametrize("target", TARGETS[:3])
def test_every_tenth_op_is_right_or_refused(target: str) -> None:
    outcomes = list(sweep(target, SAMPLE))
    assert len(outcomes) > 90
    check(target, outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_op_is_right_or_refused(target: str) -> None:
    outcomes = list(sweep(target, counted_ops()))
    write_table(outcomes, Path(__file__).parents[2] / f"out/ops/{target}.csv")
    check(target, outcomes)
