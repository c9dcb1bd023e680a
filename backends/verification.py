"""Whether an artifact computes what its program computes in PyTorch, and how far apart they may be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.reference import Reference, compare_outputs
from graphopt.errors import InputError
from graphopt.ir.program import Program
from graphopt.run.batches import Batch

__all__ = [
    "Evaluation",
    "Verification",
    "compare_outputs",
    "merged",
    "verified",
    "verified_sequence",
]


@dataclass(frozen=True)
class Evaluation:
    """What a target computed for one call.

    Attributes:
        outputs: In the program's order; empty where not every op could be evaluated.
        how: What was executed.
        complete: Whether every op was evaluated.
        notes: What could not be checked.
        weights: Number of compressed weights that were read back.
        narrow_sums: Families of ops whose terms the target adds up in 16 bits where they are given
            in 16 bits.
        state: The program's buffers that are state, in its order, as the call left them; () where
            the target does not show them.
        state_type: Float type in which the target keeps from call to call how far state is from its
            initial value; None for state in its own type.
    """

    outputs: tuple[Tensor, ...]
    how: str
    complete: bool = True
    notes: tuple[str, ...] = ()
    weights: int = 0
    narrow_sums: tuple[str, ...] = ()
    state: tuple[Tensor, ...] = ()
    state_type: torch.dtype | None = None


@dataclass(frozen=True)
class Verification:
    """Outcome of comparing an artifact with PyTorch.

    Attributes:
        max_error: Largest max|a − b| / max|b| over the outputs, b being PyTorch's.
        outputs: That figure for each output.
        how: What was executed.
        complete: Whether every op of the artifact was evaluated.
        notes: What could not be checked.
        weights: Number of compressed weights that were read back.
        holds: Whether the outputs are as near as rounding lets them be: 1e-3 of an output's peak in
            float32; in 16 bits 4 times the error of the same program in PyTorch, 2e-3 at least;
            with rounded activations two steps for 99.9 % of the values, or twice the largest error of
            the program in PyTorch with a step of noise before each rounding, and no more than that on
            the whole, as kernels that scale integers by integers come within a step; integers equal
            where rounding does not decide them. True where nothing could be compared.
        state: That figure for each buffer that is state, behind the last call; () where there is
            none, or the target does not show it.
        calls: Number of calls that were compared, each going on from the state of the one before.
        failed: Number of the first call of a sequence that does not hold, from 0.

    Examples:
        >>> artifact = graphopt.lower(model, "torch", example)
        >>> artifact.save("model.pt2").name, artifact.verification.holds
        ('model.pt2', True)
    """

    max_error: float
    outputs: tuple[float, ...]
    how: str
    complete: bool = True
    notes: tuple[str, ...] = ()
    weights: int = 0
    holds: bool = True
    state: tuple[float, ...] = ()
    calls: int = 1
    failed: int | None = None


def verified(
    evaluation: Evaluation, program: Program, call: Batch, precision: str = "float32"
) -> Verification:
    """Compare what a target computed with the program in PyTorch.

    Args:
        evaluation: For this call.
        program: What the artifact was made from.
        call: Inputs.
        precision: Float type that the artifact computes in.

    Raises:
        InputError: The number of outputs or a shape differs.
    """
    return verified_sequence([evaluation], program, [call], precision)


def verified_sequence(
    evaluations: Sequence[Evaluation],
    program: Program,
    calls: Sequence[Batch],
    precision: str = "float32",
) -> Verification:
    """Compare what a target computed with the program in PyTorch, call by call.

    The first call starts from the program's initial state, the others from what the one before left,
    on both sides.

    Args:
        evaluations: For each call.
        program: What the artifact was made from.
        calls: Inputs of each.
        precision: Float type that the artifact computes in.

    Raises:
        InputError: The number of outputs or a shape differs.
    """
    first = evaluations[0]
    facts: dict[str, Any] = {
        "how": first.how,
        "complete": all(each.complete for each in evaluations),
        "notes": tuple(dict.fromkeys(note for each in evaluations for note in each.notes)),
        "weights": first.weights,
        "calls": len(calls),
    }
    if not facts["complete"]:
        return Verification(math.nan, (), **facts)
    reference = Reference(program, calls, precision, first.narrow_sums, first.state_type)
    outcomes, states = [], []
    failed: int | None = None
    for number, evaluation in enumerate(evaluations):
        wanted, given = reference.values[number], [*evaluation.outputs, *evaluation.state]
        if not evaluation.state:
            wanted = wanted[: reference.outputs]
        errors = compare_outputs(given, wanted)
        pairs = enumerate(zip(given, errors, strict=True))
        near = [reference.holds(number, place, value, error) for place, (value, error) in pairs]
        failed = number if failed is None and not all(near) else failed
        outcomes.append(errors[: reference.outputs])
        states.append(errors[reference.outputs :])
    largest = [_largest(own) for own in zip(*outcomes, strict=True)]
    return Verification(
        _largest([*largest, *itertools.chain(*states)]) if largest else 0.0,
        tuple(largest),
        holds=failed is None,
        state=states[-1],
        failed=failed,
        **facts,
    )


def merged(outcomes: Sequence[Verification]) -> Verification:
    """One outcome for several calls: the largest errors.

    Raises:
        InputError: There is none.
    """
    if not outcomes:
        raise InputError("there is no call to compare on; give at least one")
    first = outcomes[0]
    return replace(
        first,
        max_error=_largest([outcome.max_error for outcome in outcomes]),
        outputs=tuple(map(_largest, zip(*(outcome.outputs for outcome in outcomes), strict=True))),
        state=tuple(map(_largest, zip(*(outcome.state for outcome in outcomes), strict=True))),
        calls=sum(outcome.calls for outcome in outcomes),
        complete=all(outcome.complete for outcome in outcomes),
        notes=tuple(dict.fromkeys(note for outcome in outcomes for note in outcome.notes)),
        holds=all(outcome.holds for outcome in outcomes),
    )


def _largest(errors: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, errors)) else max(errors)
