"""Core AI's own plan for a program and times of its steps, on macOS."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from graphopt.backends.compute_plan import ComputePlan, PlannedOp
from graphopt.backends.coreai.check import alone
from graphopt.exclusive import silent
from graphopt.extras import require

__all__ = ["plan_of"]

_DEVICES = {"NEURAL_ENGINE": "Neural Engine", "GPU": "GPU", "CPU": "CPU"}
_NO_WORK = ("coreai.constant", "coreai.graph")


def plan_of(ai_program: Any, feeds: Mapping[str, Any] | None, runs: int) -> ComputePlan:
    """The devices of a program's ops, and what share of the measured time each takes.

    Args:
        ai_program: As converted.
        feeds: Arrays of one call by the names of its inputs; None, where there is state, measures no times.
        runs: How often the steps are timed.

    Raises:
        Exception: What coreai-torch raises where the runtime does not tell (before macOS 27).
    """
    with silent():
        require("coreai_torch", "coreai")
        from coreai_torch.debugging.benchmarker import benchmark_coreai_program
        from coreai_torch.debugging.compute_plan import ComputePlan as TheirPlan

        async def ask() -> tuple[dict[str, Any], list[Any]]:
            plan = await TheirPlan.from_program(ai_program)
            timed = []
            if feeds is not None:
                measured = await benchmark_coreai_program(ai_program, dict(feeds), num_runs=runs)
                timed = measured.operation_timings
            return plan.to_dict(ai_program), timed

        told, timed = alone(asyncio.run, ask())
    kinds: dict[int, str] = told["operation_names"]
    placed = {entry["operation_id"]: entry for entry in told["entries"]}
    times: dict[tuple[int, ...], float] = {}
    for each in timed:  # several steps may be of the same ops
        step = tuple(each.op_ids)
        statistics = each.measurement.statistics
        times[step] = times.get(step, 0.0) + (0.0 if statistics is None else statistics.median)
    whole, covered = sum(times.values()), {number for step in times for number in step}
    rest = [
        (number,)
        for number, kind in kinds.items()
        if number in placed and number not in covered and kind not in _NO_WORK
    ]
    ops = [
        PlannedOp(
            str(step[0]),
            " + ".join(kinds[number] for number in step),
            _joined(step, placed, "devices"),
            times[step] / whole if step in times and whole else None,
            why="; ".join(_values(step, placed, "validation")),
        )
        for step in (*times, *rest)
    ]
    source = "Core AI's compute plan" + (" and benchmarker" if timed else "")
    return ComputePlan(tuple(ops), source)


def _values(step: tuple[int, ...], placed: dict[int, Any], key: str) -> list[str]:
    """What the plan says of the ops of a step, each once."""
    given = (value for number in step if number in placed for value in placed[number][key])
    return list(dict.fromkeys(given))


def _joined(step: tuple[int, ...], placed: dict[int, Any], key: str) -> str:
    names = [_DEVICES[value] for value in _values(step, placed, key) if value in _DEVICES]
    return " and ".join(names) or "unknown"
