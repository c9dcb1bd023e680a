"""Whether an artifact computes what its program computes in PyTorch, and how far apart they may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.analysis.quantized import find_quantized_activations
from graphopt.backends.narrow_sums import NarrowSums
from graphopt.errors import InputError
from graphopt.ir.program import Program
from graphopt.ir.state import restored_state
from graphopt.run.batches import Batch
from graphopt.run.interpreter import Interpreter

__all__ = ["Evaluation", "Verification", "compare_outputs", "merged", "verified"]

_EXACT = 1e-3  # of an output's peak, in float32
_HALF = 2e-3  # the least that is allowed in 16 bits
_TIMES = 4  # an artifact's error over that of the same program in PyTorch
_STEPS = 2
_TIMES_DITHER = 2
_DITHERED_RUNS = 6  # a choice, of experts for instance, may change in some of them only
_WITHIN = 0.999
_LEVELS = 255
_NOISE = 2.0**-20  # relative; a few roundings of float32
_MASK = 1e4  # what is larger hides something rather than measures it
_HALVES = (torch.float16, torch.bfloat16)


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
    """

    outputs: tuple[Tensor, ...]
    how: str
    complete: bool = True
    notes: tuple[str, ...] = ()
    weights: int = 0
    narrow_sums: tuple[str, ...] = ()


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
            with rounded activations two steps for 99.9 % of the values, or twice the error of the
            program in PyTorch with a step of noise before each rounding, as kernels that scale
            integers by integers come within a step; integers equal where rounding does not decide them. True where
            nothing could be compared.
    """

    max_error: float
    outputs: tuple[float, ...]
    how: str
    complete: bool = True
    notes: tuple[str, ...] = ()
    weights: int = 0
    holds: bool = True


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
    facts = {
        "how": evaluation.how,
        "complete": evaluation.complete,
        "notes": evaluation.notes,
        "weights": evaluation.weights,
    }
    if not evaluation.complete:
        return Verification(float("nan"), (), **facts)  # type: ignore[arg-type]
    reference = _Reference(program, call, precision, evaluation.narrow_sums)
    errors = compare_outputs(evaluation.outputs, reference.outputs)
    pairs = enumerate(zip(evaluation.outputs, errors, strict=True))
    holds = all(reference.holds(place, output, error) for place, (output, error) in pairs)
    return Verification(max(errors, default=0.0), errors, holds=holds, **facts)  # type: ignore[arg-type]


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
        complete=all(outcome.complete for outcome in outcomes),
        notes=tuple(dict.fromkeys(note for outcome in outcomes for note in outcome.notes)),
        holds=all(outcome.holds for outcome in outcomes),
    )


def _largest(errors: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def compare_outputs(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, ...]:
    """max|a − b| / max|b| of each pair, over what is finite; equal shapes are required.

    Infinite where one is NaN or infinite and the other is not the same.

    Raises:
        InputError: The number of outputs or a shape differs.
    """
    if len(outputs) != len(expected):
        raise InputError(f"{len(outputs)} outputs, PyTorch has {len(expected)}")
    errors = []
    for a, b in zip(outputs, expected, strict=True):
        if a.numel() != b.numel():
            raise InputError(f"an output has shape {tuple(a.shape)}, PyTorch's {tuple(b.shape)}")
        want = b.detach().to(torch.float64)
        got = a.detach().to(torch.float64).reshape(want.shape)
        finite = want.isfinite() & got.isfinite()
        same = (got == want) | (got.isnan() & want.isnan())
        if not bool((finite | same).all()):
            errors.append(math.inf)
            continue
        gap, size = (got - want)[finite].abs(), want[finite].abs()
        scale = float(size.max()) if size.numel() else 0.0
        worst = float(gap.max()) if gap.numel() else 0.0
        errors.append(worst / scale if scale > 0 else worst)
    return tuple(errors)


class _Reference:
    """What a program gives in PyTorch for one call, and how much of it rounding decides.

    The program's own outputs are computed once. Only where an artifact differs by more than a limit
    that holds without looking is the program run again, with rounding behind each op.
    """

    def __init__(
        self, program: Program, call: Batch, precision: str, narrow_sums: Collection[str] = ()
    ) -> None:
        self.program, self.call, self.narrow_sums = program, call, narrow_sums
        self.half = next(iter(_half_types(program)), None)
        self.is_half = precision == "float16" or self.half is not None
        with torch.no_grad(), restored_state(program.graph_module):
            if self.half is None:
                given = pytree.tree_leaves(program.graph_module(*call[0], **call[1]))
            else:
                given = self._run(lambda value: value)
        self.outputs = [leaf for leaf in given if isinstance(leaf, Tensor)]
        self._rounded: list[list[Tensor]] = []
        self._dither: list[list[Tensor]] = []
        self._activations: bool | None = None

    def holds(self, place: int, output: Tensor, error: float) -> bool:
        """Whether one output is as near as it can be asked to be.

        Args:
            place: Its number.
            output: The target's value.
            error: max|a − b| / max|b|.
        """
        want = self.outputs[place]
        if not want.is_floating_point():
            return error == 0 or self._decided_by_rounding(place, output)
        limit = _HALF if self.is_half else _EXACT
        if error <= limit:
            return True
        if not math.isfinite(error):
            return False
        if self._rounds_activations():
            beyond = _beyond_steps(output, want)
            if beyond <= 1 - _WITHIN:
                return True
            own = max(compare_outputs([run[place]], [want])[0] for run in self._dithered())
            if error <= _TIMES_DITHER * own:
                return True
        if not self.is_half:
            return self._decided_by_rounding(place, output)
        own = max((size for size in self._errors(place) if math.isfinite(size)), default=0.0)
        return error <= _TIMES * own

    def _errors(self, place: int) -> list[float]:
        want = self.outputs[place]
        return [compare_outputs([run[place]], [want])[0] for run in self._runs()]

    def _decided_by_rounding(self, place: int, output: Tensor) -> bool:
        """Whether PyTorch's own value moves as far where the target's differs.

        Integers may be anything where a rounding run gives another one.
        """
        want = self.outputs[place].to(torch.float64)
        got = output.detach().to(torch.float64).reshape(want.shape)
        is_float = self.outputs[place].is_floating_point()
        moved = torch.zeros_like(want)
        for run in self._runs():
            moved = moved.maximum((run[place].to(torch.float64) - want).abs())
        if not is_float:
            return bool(((got == want) | (moved > 0)).all())
        limit = _EXACT * float(want.abs().max())
        return bool(((got - want).abs() <= (_TIMES * moved).clamp(min=limit)).all())

    def _rounds_activations(self) -> bool:
        if self._activations is None:
            self._activations = bool(find_quantized_activations(self.program.graph_module))
        return self._activations

    def _runs(self) -> list[list[Tensor]]:
        """Outputs of the program with rounding behind each op, of 16 bits or in the last bits."""
        if not self._rounded:
            noise = [_noisy(seed) for seed in (0, 1)]
            kind = self.half or torch.float16
            behind = [*noise, _to_and_back(kind)] if self.is_half else noise
            self._rounded = [self._run(rule) for rule in behind]
            if self.is_half and self.narrow_sums:
                self._rounded.append(
                    self._run(_to_and_back(kind), sums=NarrowSums(self.narrow_sums))
                )
        return self._rounded

    def _dithered(self) -> list[list[Tensor]]:
        """Outputs with a step of noise before each value is rounded."""
        if not self._dither:
            nodes = {
                activation.node
                for activation in find_quantized_activations(self.program.graph_module)
            }
            for seed in range(_DITHERED_RUNS):
                generator = torch.Generator().manual_seed(seed)
                self._dither.append(self._run(lambda x: x, nodes, generator))
        return self._dither

    def _run(
        self,
        behind: Callable[[Tensor], Tensor],
        dithered: Collection[fx.Node] = (),
        generator: torch.Generator | None = None,
        sums: NarrowSums | None = None,
    ) -> list[Tensor]:
        """Outputs with what is done to each float value, computed in float32 or wider.

        Args:
            behind: What becomes of a float value.
            dithered: Nodes that round; before them noise of a step is added.
            generator: Of the noise.
            sums: What adding up in 16 bits does to the results.
        """
        interpreter = Interpreter(self.program.graph_module, copies=True)

        def compute(node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
            step = node.args[1] if node in dithered and len(node.args) > 1 else None

            def read(used: fx.Node) -> Any:
                x = _wide(value(used))
                if isinstance(step, float) and used is node.args[0]:
                    x = x + step * (2 * torch.rand(x.shape, generator=generator) - 1)
                return x

            result = interpreter.call(node, read)
            if sums is not None and sums.concerns(node):
                result = sums.behind(node, result, read)
            return pytree.tree_map_only(Tensor, lambda x: _changed(x, behind), result)

        wanted = interpreter.results()
        values = {
            node: _changed(given, behind) if isinstance(given, Tensor) else given
            for node, given in interpreter.inputs(self.call).items()
        }
        nodes = [node for node in interpreter.nodes if node.op not in ("placeholder", "output")]
        with torch.no_grad():
            interpreter.walk(nodes, values, last=interpreter.last, kept=set(wanted), call=compute)
        return [x for x in (values[node] for node in wanted) if isinstance(x, Tensor)]


def _half_types(program: Program) -> set[torch.dtype]:
    tensors = (*program.graph_module.parameters(), *program.graph_module.buffers())
    given = pytree.tree_leaves((program.example_args, program.example_kwargs))
    floats = [x.dtype for x in (*tensors, *given) if isinstance(x, Tensor)]
    return {dtype for dtype in floats if dtype in _HALVES}


def _wide(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.float() if x.dtype in _HALVES else x, value)


def _changed(x: Tensor, behind: Callable[[Tensor], Tensor]) -> Tensor:
    return behind(x) if x.dtype in (torch.float32, torch.float64, *_HALVES) else x


def _to_and_back(kind: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(kind).to(torch.float32)


def _noisy(seed: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noisy(x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in _HALVES else x
        unit = _NOISE * (torch.rand(x.shape, generator=generator) * 2 - 1)
        sizes = wide.abs()
        used = sizes[(sizes > 0) & (sizes < _MASK)]
        typical = float(used.median()) if used.numel() else 0.0
        # ties between zeros are ties, too
        moved = wide * (1 + unit) + unit * typical
        largest = torch.finfo(wide.dtype).max
        return torch.where(wide.isfinite(), moved.clamp(-largest, largest), wide)

    return noisy


def _beyond_steps(output: Tensor, want: Tensor) -> float:
    """Share of the values that are farther than two steps of 8 bits over the output's range."""
    reference = want.to(torch.float64)
    got = output.detach().to(torch.float64).reshape(reference.shape)
    # the range of a rounded value holds zero
    low, high = min(float(reference.min()), 0.0), max(float(reference.max()), 0.0)
    beyond = (got - reference).abs() > _STEPS * (high - low) / _LEVELS
    return float(beyond.double().mean())
