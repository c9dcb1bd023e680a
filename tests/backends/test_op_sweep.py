"""Torch's own op database on every target: right, or refused by name; never wrong, never a crash."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.op_calls import counted_ops
from helpers.op_sweep import Sweeper, check_share, sweep, write_table

# share of the calls that come out right, at least
SHARES = {"coreai": 0.9, "coreml": 0.85, "executorch": 0.9, "torch": 0.95}
TARGETS = [
    pytest.param(name, marks=[getattr(pytest.mark, name)] if name != "torch" else [])
    for name in SHARES
]


@pytest.fixture(scope="module")
def sweeper() -> Iterator[Sweeper]:
    with contextlib.closing(Sweeper()) as made:
        yield made


@pytest.mark.integration
@pytest.mark.parametrize("target", TARGETS[:3])
def test_some_ops_are_right_or_refused(target: str, sweeper: Sweeper) -> None:
    # ExecuTorch takes three times as long
    tried = counted_ops()[3 :: 25 if target == "executorch" else 10]
    outcomes = list(sweeper.sweep(target, tried))
    assert len(outcomes) > len(counted_ops()) / 30
    check_share(outcomes, SHARES[target])


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_op_is_right_or_refused(target: str) -> None:
    outcomes = sweep(target, counted_ops())
    write_table(outcomes, Path(__file__).parents[2] / f"out/ops/{target}.csv")
    check_share(outcomes, SHARES[target])
