"""Sums over what a target says of its ops."""

from __future__ import annotations

import logging

import pytest

from graphopt.backends import ComputePlan, PlannedOp
from graphopt.backends.compute_plan import plan_or_none


def _plan(*ops: PlannedOp) -> ComputePlan:
    return ComputePlan(ops, "a planner")


def test_ops_and_shares_are_summed_by_device_most_ops_first() -> None:
    plan = _plan(
        PlannedOp("a", "gather", "CPU", 0.25),
        PlannedOp("b", "conv", "Neural Engine", 0.5),
        PlannedOp("c", "conv", "Neural Engine", 0.25),
    )
    assert list(plan.devices.items()) == [("Neural Engine", 2), ("CPU", 1)]
    assert plan.share("Neural Engine") == 0.75
    assert [op.name for op in plan.on("CPU")] == ["a"]
    assert str(plan) == "Neural Engine 2 ops, 75 %; CPU 1 op, 25 % (a planner)"


def test_what_a_target_does_not_tell_is_not_made_up() -> None:
    plan = _plan(PlannedOp("a", "conv", "GPU"), PlannedOp("b", "relu", "GPU", 0.5))
    assert plan.share("GPU") == 0.5
    assert plan.share("CPU") is None
    assert str(_plan(PlannedOp("a", "conv", "GPU"))) == "GPU 1 op (a planner)"
    assert str(_plan()) == "no ops (a planner)"


def test_planner_that_fails_is_a_warning_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    def old() -> ComputePlan:
        raise ValueError("needs a newer system")

    with caplog.at_level(logging.WARNING):
        assert plan_or_none("Core X", old) is None
    assert "Core X tells no compute plan here: ValueError: needs a newer system" in caplog.text
