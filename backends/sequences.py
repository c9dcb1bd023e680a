"""Calls of a program with state, one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from graphopt.backends.shapes import ShapePlan
from graphopt.capture.exporting import run_on_copies
from graphopt.ir.program import Program, share_graph
from graphopt.ir.state import carried_state, state_of, state_values, with_state
from graphopt.run.batches import Batch, CallSequence, as_batch

__all__ = ["behind", "example_calls", "sequence_of"]

_CALLS = 3


def sequence_of(calls: Any) -> list[Batch]:
    """The calls of a `CallSequence`, or the one call that is given."""
    return [as_batch(call) for call in (calls if isinstance(calls, CallSequence) else [calls])]


def _example_sequence(program: Program) -> list[Batch]:
    """The program's example; with state three times, or as often as it runs: a cache may be full."""
    call = (program.example_args, program.example_kwargs)
    gm = program.graph_module
    if not state_of(gm):
        return [call]
    done = 0
    with torch.no_grad(), carried_state(gm):
        while done < _CALLS:
            try:
                run_on_copies(gm, *call)
            except (RuntimeError, IndexError):
                break
            done += 1
    return [call] * max(1, done)


def example_calls(program: Program, shapes: ShapePlan) -> list[list[Batch]]:
    """The sequences of calls that an artifact is compared on unless others are given.

    Args:
        program: With an example.
        shapes: Sizes that the artifact takes; where they are open, calls of other sizes too.
    """
    others = shapes.calls(program) if shapes.is_open else []
    return [_example_sequence(program), *([call] for call in others)]


def behind(program: Program, calls: Sequence[Batch]) -> Program:
    """The program as these calls leave it; the given one stays as it is."""
    if not calls:
        return program
    moved = replace(program, graph_module=share_graph(program.graph_module))
    gm = moved.graph_module
    with_state(gm, state_values(gm))
    with torch.no_grad():
        for call in calls:
            run_on_copies(gm, *call)
    return moved
