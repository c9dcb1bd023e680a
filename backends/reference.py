"""What a program gives in PyTorch, how far an artifact is from it, and how far rounding lets it be."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.analysis.quantized import find_quantized_activations
from graphopt.backends.narrow_sums import NarrowSums
from graphopt.capture.exporting import run_on_copies
from graphopt.errors import InputError
from graphopt.ir.op_info import info_of, takes_sizes_alone
from graphopt.ir.program import Program
from graphopt.ir.state import carried_state, state_nodes, state_of, state_values, with_state
from graphopt.run.batches import Batch
from graphopt.run.interpreter import Interpreter

__all__ = ["Reference", "compare_outputs"]

_EXACT = 1e-3  # of an output's peak, in float32
_HALF = 2e-3  # the least that is allowed in 16 bits
_TIMES = 4  # an artifact's error over that of the same program in PyTorch
_STEPS = 2
_TIMES_DITHER = 2
_DITHERED_RUNS = 6  # a choice, of experts for instance, may change in some of them only
_WITHIN = 0.999
_LEVELS = 255
_NOISE = 2.0**-20  # relative; a few roundings of float32
_WHOLE = 2**24  # whole numbers below it are exact in float32
_MASK = 1e4  # what is larger hides something rather than measures it
_HALVES = (torch.float16, torch.bfloat16)


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


_Run = list[list[Tensor]]  # values of each call


class Reference:
    """What a program gives in PyTorch for a sequence of calls, and how much of it rounding decides.

    The program's own values are computed once. Only where an artifact differs by more than a limit
    that holds without looking is the program run again, with rounding behind each op.

    Args:
        program: What the artifact was made from.
        calls: Inputs of each call; the first starts from the program's initial state.
        precision: Float type that the artifact computes in.
        narrow_sums: As for `Evaluation`.
        state_type: As for `Evaluation`.

    Attributes:
        values: For each call, the outputs and then the state behind it.
        outputs: Number of outputs.
    """

    def __init__(
        self,
        program: Program,
        calls: Sequence[Batch],
        precision: str,
        narrow_sums: Collection[str] = (),
        state_type: torch.dtype | None = None,
    ) -> None:
        self.program, self.calls = program, calls
        self.narrow_sums, self.state_type = narrow_sums, state_type
        self.half = next(iter(_half_types(program)), None)
        self.is_half = precision == "float16" or self.half is not None
        self._starts = {
            name: x.detach().clone() for name, x in state_values(program.graph_module).items()
        }
        if self.half is None:
            with torch.no_grad():
                self.values = self._plain()
        else:
            self.values = self._run(lambda value: value)
        self.outputs = len(self.values[0]) - len(state_of(program.graph_module))
        self._rounded: list[_Run] = []
        self._dither: list[_Run] = []
        self._activations: bool | None = None

    def _plain(self) -> _Run:
        gm, results = self.program.graph_module, []
        with carried_state(gm):
            for args, kwargs in self.calls:
                given = pytree.tree_leaves(run_on_copies(gm, args, kwargs))
                outputs = [leaf for leaf in given if isinstance(leaf, Tensor)]
                results.append([*outputs, *self._moved(state_values(gm))])
        return results

    def _moved(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """What the next call finds, the types being as the target keeps them."""
        gm = self.program.graph_module
        if self.state_type is not None:
            state = {name: self._stored(x, self._starts[name]) for name, x in state.items()}
        kinds = {name: held.dtype for name, held in state_values(gm).items()}
        with_state(gm, {name: x.to(kinds[name]) for name, x in state.items()})
        return [x.detach().clone() for x in state.values()]

    def _stored(self, value: Tensor, start: Tensor) -> Tensor:
        """A state as it is kept: how far it is from its initial value."""
        if self.state_type is None or not value.is_floating_point():
            return value
        return start + (value - start).to(self.state_type).to(value.dtype)

    def holds(self, call: int, place: int, output: Tensor, error: float) -> bool:
        """Whether one value is as near as it can be asked to be.

        Args:
            call: Number of the call.
            place: Number of the value among `values`.
            output: The target's value.
            error: max|a − b| / max|b|.
        """
        want = self.values[call][place]
        if not want.is_floating_point():
            return error == 0 or self._decided_by_rounding(call, place, output)
        limit = _EXACT
        if self.is_half:
            # at least what rounding one value may do
            limit = max(_HALF, torch.finfo(self.half or torch.float16).eps / 2)
        if error <= limit:
            return True
        if not math.isfinite(error):
            return False
        if self._rounds_activations():
            beyond = _beyond_steps(output, want)
            if beyond <= 1 - _WITHIN:
                return True
            runs = self._dithered()
            own = max(compare_outputs([run[call][place]], [want])[0] for run in runs)
            # one value may be far off where the network doubts; all of them together may not
            typical = max(_distance(run[call][place], want) for run in runs)
            if error <= _TIMES_DITHER * own and _distance(output, want) <= typical:
                return True
        if not self.is_half:
            return self._decided_by_rounding(call, place, output)
        sizes = [compare_outputs([run[call][place]], [want])[0] for run in self._runs()]
        own = max((size for size in sizes if math.isfinite(size)), default=0.0)
        return error <= _TIMES * own

    def _decided_by_rounding(self, call: int, place: int, output: Tensor) -> bool:
        """Whether PyTorch's own value moves as far where the target's differs.

        Integers may be anything where a rounding run gives another one.
        """
        given = self.values[call][place]
        want = given.to(torch.float64)
        got = output.detach().to(torch.float64).reshape(want.shape)
        moved = torch.zeros_like(want)
        for run in self._runs():
            moved = moved.maximum((run[call][place].to(torch.float64) - want).abs())
        if not given.is_floating_point():
            return bool(((got == want) | (moved > 0)).all())
        limit = _EXACT * float(want.abs().max())
        return bool(((got - want).abs() <= (_TIMES * moved).clamp(min=limit)).all())

    def _rounds_activations(self) -> bool:
        if self._activations is None:
            self._activations = bool(find_quantized_activations(self.program.graph_module))
        return self._activations

    def _runs(self) -> list[_Run]:
        """Outputs of the program with rounding behind each op, of 16 bits or in the last bits."""
        if not self._rounded:
            noise: list[Callable[[Tensor], Tensor]] = [_Noise(seed) for seed in (0, 1)]
            kind = self.half or torch.float16
            behind = [*noise, _to_and_back(kind)] if self.is_half else noise
            self._rounded = [self._run(rule) for rule in behind]
            if self.half is not None:
                # inside of recurrent layers and the like, which targets break up, rounding is theirs too
                with torch.no_grad(), suppress(RuntimeError):  # some have no kernel in 16 bits
                    self._rounded.append(self._plain())
            if self.is_half and self.narrow_sums:
                self._rounded.append(
                    self._run(_to_and_back(kind), sums=NarrowSums(self.narrow_sums, kind))
                )
        return self._rounded

    def _dithered(self) -> list[_Run]:
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
    ) -> _Run:
        """Values with what is done to each float value, computed in float32 or wider.

        Args:
            behind: What becomes of a float value; noise spares whole numbers that are computed
                from such, which are the same everywhere.
            dithered: Nodes that round; before them noise of a step is added.
            generator: Of the noise.
            sums: What adding up in 16 bits does to the results.
        """
        gm = self.program.graph_module
        interpreter = Interpreter(gm, copies=True)
        spares = isinstance(behind, _Noise)
        moved: set[fx.Node] = set()

        def changed(node: fx.Node, value: Any) -> Any:
            read = () if takes_sizes_alone(node) else node.all_input_nodes
            if spares and moved.isdisjoint((node, *read)) and _is_whole(value):
                return value
            moved.add(node)
            return pytree.tree_map_only(Tensor, lambda x: _changed(x, behind), value)

        def compute(node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
            info = info_of(node)
            if info is not None and info.check == "type":
                return None  # values are wider than it says
            step = node.args[1] if node in dithered and len(node.args) > 1 else None

            def read(used: fx.Node) -> Any:
                x = _wide(value(used))
                if isinstance(step, float) and used is node.args[0]:
                    x = x + step * (2 * torch.rand(x.shape, generator=generator) - 1)
                return x

            result = interpreter.call(node, read)
            if sums is not None and sums.concerns(node):
                result = sums.behind(node, result, read)
            return changed(node, result)

        wanted, writers = interpreter.results(), state_nodes(gm)
        kept, results = {*wanted, *writers.values()}, []
        written: set[fx.Node] = set()
        with torch.no_grad(), carried_state(gm):
            for call in self.calls:
                moved.clear()
                moved.update(written)
                values = {
                    node: changed(node, given) for node, given in interpreter.inputs(call).items()
                }
                interpreter.walk(
                    interpreter.computed, values, last=interpreter.last, kept=kept, call=compute
                )
                outputs = [x for x in (values[node] for node in wanted) if isinstance(x, Tensor)]
                state = {
                    str(node.target): values[writer]
                    for node, writer in writers.items()
                    if node.op == "get_attr"
                }
                written |= {node for node, writer in writers.items() if writer in moved}
                results.append([*outputs, *self._moved(state)])
        return results


def _half_types(program: Program) -> set[torch.dtype]:
    gm = program.graph_module
    tensors = (*gm.parameters(), *gm.buffers())
    given = pytree.tree_leaves((program.example_args, program.example_kwargs))
    values = pytree.tree_leaves([node.meta.get("val") for node in gm.graph.nodes])
    floats = [x.dtype for x in (*tensors, *given, *values) if isinstance(x, Tensor)]
    return {dtype for dtype in floats if dtype in _HALVES}


def _wide(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.float() if x.dtype in _HALVES else x, value)


def _changed(x: Tensor, behind: Callable[[Tensor], Tensor]) -> Tensor:
    return behind(x) if x.dtype in (torch.float32, torch.float64, *_HALVES) else x


def _to_and_back(kind: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(kind).to(torch.float32)


def _is_whole(value: Any) -> bool:
    """Whether all numbers of a value are whole, so that arithmetic that made them was exact."""
    floats = [
        x for x in pytree.tree_leaves(value) if isinstance(x, Tensor) and x.is_floating_point()
    ]
    return all(bool((x == x.round()).all()) and bool((x.abs() < _WHOLE).all()) for x in floats)


class _Noise:
    """Noise of a few roundings."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        """The value with some."""
        wide = x.float() if x.dtype in _HALVES else x
        unit = _NOISE * (torch.rand(x.shape, generator=self._generator) * 2 - 1)
        sizes = wide.abs()
        used = sizes[(sizes > 0) & (sizes < _MASK)]
        typical = float(used.median()) if used.numel() else 0.0
        # ties between zeros are ties, too
        moved = wide * (1 + unit) + unit * typical
        largest = torch.finfo(wide.dtype).max
        return torch.where(wide.isfinite(), moved.clamp(-largest, largest), wide)


def _distance(output: Tensor, want: Tensor) -> float:
    """Root of the mean squared difference."""
    reference = want.to(torch.float64)
    return float(
        (output.detach().to(torch.float64).reshape(reference.shape) - reference)
        .square()
        .mean()
        .sqrt()
    )


def _beyond_steps(output: Tensor, want: Tensor) -> float:
    """Share of the values that are farther than two steps of 8 bits over the output's range."""
    reference = want.to(torch.float64)
    got = output.detach().to(torch.float64).reshape(reference.shape)
    # the range of a rounded value holds zero
    low, high = min(float(reference.min()), 0.0), max(float(reference.max()), 0.0)
    beyond = (got - reference).abs() > _STEPS * (high - low) / _LEVELS
    return float(beyond.double().mean())
