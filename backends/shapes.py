"""Which sizes of its inputs an artifact takes: the example's, any within bounds, or some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.analysis.open_dims import OpenDim, open_dims, resized_example
from graphopt.capture.exporting import run_on_copies
from graphopt.errors import GraphOptError, LoweringError
from graphopt.ir.program import Program
from graphopt.ir.state import carried_state
from graphopt.run.batches import Batch

__all__ = ["EXAMPLE_SHAPES", "ShapePlan", "Shapes", "plan_shapes", "refuse_fixed"]

Shapes = Any
Bounds = tuple[int, int | None]
_LOWEST = 8  # smaller sizes are tried up to this one


@dataclass(frozen=True)
class ShapePlan:
    """Sizes that an artifact takes.

    Attributes:
        bounds: Symbol → smallest and largest size; empty where every size is the example's.
        dims: The open dimensions that these symbols decide.
        enumerated: Input → its shapes, one behind the other for all inputs; {} where every size
            within the bounds is taken.
    """

    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    dims: tuple[OpenDim, ...] = ()
    enumerated: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether any size is not the example's."""
        return bool(self.bounds)

    def limits(self, program: Program) -> dict[int, dict[int, Bounds]]:
        """Position of an input → dimension → smallest and largest size, for exporting again.

        Args:
            program: The one that is exported; inputs have the names of the planned one.
        """
        names = {str(n.target): i for i, n in enumerate(_placeholders(program))}
        limits: dict[int, dict[int, Bounds]] = {}
        for dim in self.dims:
            if dim.input in names:
                limits.setdefault(names[dim.input], {})[dim.axis] = self.bounds.get(
                    dim.symbol, (dim.low, dim.high)
                )
        return limits

    def calls(self, program: Program) -> list[Batch]:
        """The example at other sizes: the bounds and one between, or each that is enumerated.

        Args:
            program: Sizes that it refuses are left out.
        """
        made: list[tuple[list[tuple[int, ...]], Batch]] = []
        for sizes in self._sizes(program):
            call = resized_example(program, sizes)
            shapes = [tuple(x.shape) for x in pytree.tree_leaves(call) if isinstance(x, Tensor)]
            if all(shapes != known for known, _ in made):
                made.append((shapes, call))
        return [call for _, call in made]

    def _sizes(self, program: Program) -> Iterator[Mapping[str, int]]:
        examples = {dim.symbol: dim.example for dim in self.dims if dim.is_free}
        if self.enumerated:
            count = len(next(iter(self.enumerated.values())))
            for number in range(count):
                yield {
                    dim.symbol: self.enumerated[dim.input][number][dim.axis]
                    for dim in self.dims
                    if dim.is_free and dim.input in self.enumerated
                }
            return
        low = {symbol: max(1, bounds[0]) for symbol, bounds in self.bounds.items()}
        for extra in range(_LOWEST):
            sizes = {s: min(v + extra, max(v, examples[s])) for s, v in low.items()}
            if _runs(program, sizes):
                yield sizes
                break
        yield {}
        between = {s: (low[s] + (b[1] or 2 * examples[s] + 1)) // 2 for s, b in self.bounds.items()}
        largest = {s: b[1] or 2 * examples[s] + 1 for s, b in self.bounds.items()}
        for sizes in (between, largest):
            if _runs(program, sizes):
                yield sizes


EXAMPLE_SHAPES = ShapePlan()


def _runs(program: Program, sizes: Mapping[str, int]) -> bool:
    gm = program.graph_module
    try:
        with torch.no_grad(), carried_state(gm):
            run_on_copies(gm, *resized_example(program, sizes))
    except (RuntimeError, IndexError, ValueError, GraphOptError):
        return False
    return True


def plan_shapes(program: Program, shapes: Shapes, target: str, *, bounded: str = "") -> ShapePlan:
    """What sizes an artifact of a program takes.

    Args:
        program: As it was captured.
        shapes: "example"; "open", as it was captured; or a mapping from an input's name to its
            bounds, {dimension: (smallest, largest)}, or to a list of the shapes that it may have.
        target: The target's name in messages.
        bounded: Why the target needs to know the largest sizes; "" where it does not.

    Raises:
        LoweringError: The program fixes a size that should be open, there is no such input or
            dimension, or a largest size is missing.
    """
    if isinstance(shapes, str) and shapes == "example":
        return ShapePlan()
    dims = open_dims(program)
    if isinstance(shapes, str):
        if shapes != "open":
            raise LoweringError(
                f"shapes must be 'example', 'open' or a mapping from inputs to bounds, got {shapes!r}"
            )
        if not dims:
            fixed = ", ".join(program.provenance.static_dims) or "every size"
            raise LoweringError(
                f"the program was captured with fixed sizes ({fixed}); capture it with"
                " dynamic_shapes='auto', or lower it with shapes='example'"
            )
        bounds = {dim.symbol: (dim.low, dim.high) for dim in dims if dim.is_free}
        plan = ShapePlan(bounds, tuple(dims))
    elif isinstance(shapes, Mapping):
        plan = _mapped(program, dims, shapes)
    else:
        raise LoweringError(f"shapes must be 'example', 'open' or a mapping, got {shapes!r}")
    if bounded:
        _refuse_unbounded(plan, f"{target} {bounded}")
    return plan


def _mapped(program: Program, dims: Sequence[OpenDim], shapes: Mapping[str, Any]) -> ShapePlan:
    inputs = {str(node.target) for node in _placeholders(program)}
    unknown = sorted(set(shapes) - inputs)
    if unknown:
        raise LoweringError(f"shapes: no input {unknown}; there are {sorted(inputs)}")
    bounds: dict[str, Bounds] = {}
    enumerated: dict[str, tuple[tuple[int, ...], ...]] = {}
    for name, wanted in shapes.items():
        own = {dim.axis: dim for dim in dims if dim.input == name}
        if isinstance(wanted, Mapping):
            asked = {int(axis): (int(low), int(high)) for axis, (low, high) in wanted.items()}
        else:
            listed = tuple(tuple(int(size) for size in shape) for shape in wanted)
            enumerated[name] = listed
            columns = [set(column) for column in zip(*listed, strict=True)]
            asked = {i: (min(c), max(c)) for i, c in enumerate(columns) if len(c) > 1 or i in own}
        for axis, span in asked.items():
            if axis not in own:
                raise LoweringError(
                    f"{name}[{axis}] is fixed by the captured program; capture it with an example and"
                    " dynamic_shapes that leave it open"
                )
            dim = own[axis]
            if span[0] < dim.low - 1 or (dim.high is not None and span[1] > dim.high):
                raise LoweringError(
                    f"{dim.place}: sizes from {span[0]} to {span[1]}, captured for {dim.low} to"
                    f" {dim.high or 'any'}"
                )
            bounds[dim.symbol] = span
    if len({len(listed) for listed in enumerated.values()}) > 1:
        raise LoweringError("shapes: list as many shapes for each input; they belong together")
    free = {symbol for dim in dims for symbol in bounds if symbol in dim.symbol}
    taken = tuple(dim for dim in dims if dim.symbol in bounds or (not dim.is_free and free))
    return ShapePlan({s: b for s, b in bounds.items() if s.isidentifier()}, taken, enumerated)


def _refuse_unbounded(plan: ShapePlan, why: str) -> None:
    missing = [
        dim.place
        for dim in plan.dims
        if dim.is_free and plan.bounds.get(dim.symbol, (1, None))[1] is None
    ]
    if missing:
        name, _, axis = missing[0].rstrip("]").partition("[")
        raise LoweringError(
            f"{why}, and {', '.join(missing)} has no bound: give"
            f" shapes={{{name!r}: {{{axis}: (1, 512)}}}}, or capture with"
            " torch.export.Dim(…, max=…)"
        )


def refuse_fixed(exported: ExportedProgram, plan: ShapePlan, target: str) -> None:
    """Raise where a size that should be open no longer is, so that nothing is dropped in silence.

    Args:
        exported: The program in the target's ops.
        plan: What should be open.
        target: The target's name in messages.

    Raises:
        LoweringError: With the dimensions' names.
    """
    wanted = {(dim.input, dim.axis): dim for dim in plan.dims}
    fixed = []
    for node in exported.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for axis, size in enumerate(value.shape) if isinstance(value, Tensor) else ():
            dim = wanted.get((node.name, axis))
            if dim is None:
                continue
            if isinstance(size, int) or size.node.maybe_as_int() is not None:
                fixed.append(f"{dim.place} = {int(size)}")
    if fixed:
        raise LoweringError(
            f"{target} cannot leave these sizes open: {', '.join(fixed)}; lower with shapes='example'"
            " for each size, or name only the others in shapes={…}"
        )


def _placeholders(program: Program) -> list[Any]:
    return list(program.graph_module.graph.find_nodes(op="placeholder"))
