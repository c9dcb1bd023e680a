"""Run pipelines of passes: in order, measured, dumped and verified on request."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.errors import InputError, PassError
from graphopt.exclusive import exclusively
from graphopt.ir.graph_text import graph_text
from graphopt.ir.program import share_graph
from graphopt.passes.pass_base import Pass, PassResult, missing_passes

__all__ = ["AnyPass", "PassManager", "PassRecord", "PassReport", "name_of", "run_passes"]

AnyPass = Callable[[fx.GraphModule], PassResult | None]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        name: Its name.
        modified: Whether it says that it changed the graph.
        seconds: Wall time, checks and dumps left out.
        nodes_before: Nodes of the graph before it.
        nodes_after: Nodes after it.
        error: max|a − b| / max|b| of the outputs against what the pass must compute; None where that
            was not asked for, or where the pass changes values in a way that nothing predicts.
        tolerance: What the pass allows itself.

    Examples:
        >>> from graphopt import pipelines
        >>> record = pipelines.palettize().run(model, example).pass_report.records[0]
        >>> isinstance(record, PassRecord), record.name
        (True, 'raise-to-vocabulary')
    """

    name: str
    modified: bool
    seconds: float
    nodes_before: int
    nodes_after: int
    error: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class PassReport:
    """What a pipeline did, pass by pass; a program's `pass_report` prints as a table.

    Examples:
        >>> from graphopt.passes import FoldBatchNorm
        >>> from graphopt.pipelines import PassManager
        >>> report = PassManager((FoldBatchNorm(),)).run(convolutional.graph_module)
        >>> isinstance(report, PassReport), report.modified, [record.name for record in report]
        (True, True, ['fold-batch-norm'])
    """

    records: tuple[PassRecord, ...]

    def __repr__(self) -> str:
        return f"PassReport({len(self)} passes, {self.seconds:.2f} s)"

    def __iter__(self) -> Iterator[PassRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def seconds(self) -> float:
        """Wall time of all passes."""
        return sum(record.seconds for record in self.records)

    @property
    def modified(self) -> bool:
        """Whether any pass changed the graph."""
        return any(record.modified for record in self.records)

    def __str__(self) -> str:
        lines = [
            f"{record.name}: {'changed' if record.modified else 'unchanged'}, {1e3 * record.seconds:.1f} ms,"
            f" {record.nodes_before} → {record.nodes_after} nodes"
            for record in self.records
        ]
        return "\n".join(lines)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Records as plain values."""
        return [asdict(record) for record in self.records]


def name_of(step: AnyPass) -> str:
    """A pass's name, ours or any callable's."""
    name = getattr(step, "name", None) or getattr(step, "__name__", None)
    return str(name or type(step).__name__)


@dataclass(frozen=True)
class PassManager:
    """Runs passes in order on a graph module, in place; it is itself such a pass.

    >>> from graphopt.passes import FoldBatchNorm, RemoveUnused
    >>> gm = graphopt.capture(model, example).graph_module
    >>> passes = (FoldBatchNorm(), RemoveUnused())
    >>> report = PassManager(passes, dump_dir="passes", verify=True, example_inputs=example).run(gm)

    Attributes:
        passes: Ours, or any callable in torch.fx's pass form.
        dump_dir: Folder that gets a numbered folder per pass: `before.txt`, `after.txt` and
            `changes.diff`, a unified diff of the two.
        verify: Compare each pass's graph with its input on `example_inputs`, within the pass's own
            `tolerance`; a pass of another kind may change nothing beyond `foreign_tolerance`.
        example_inputs: Positional inputs of one call, for `verify`.
        example_kwargs: Keyword inputs of that call.
        foreign_tolerance: Allowed max|a − b| / max|b| of passes that declare none.
    """

    passes: Sequence[AnyPass]
    dump_dir: str | Path | None = None
    verify: bool = False
    example_inputs: tuple[Any, ...] | Tensor = ()
    example_kwargs: Mapping[str, Any] = field(default_factory=dict)
    foreign_tolerance: float = 1e-5

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Run all passes; see `run`."""
        return PassResult(gm, self.run(gm).modified)

    @exclusively
    def run(self, gm: fx.GraphModule) -> PassReport:
        """Run all passes on `gm`, in place.

        Returns:
            One record per pass.

        Raises:
            PassError: A pass comes before one that it needs (found before anything runs), left an
                invalid graph, or computes something else than it must; the message names it.
            InputError: `verify` is set and there are no example inputs.
        """
        if self.verify and not (self._inputs() or self.example_kwargs):
            raise InputError("verify=True needs example_inputs to run the graph on")
        check_order(self.passes, gm)
        records = []
        for number, step in enumerate(self.passes):
            records.append(self._run_one(number, step, gm))
        return PassReport(tuple(records))

    def _inputs(self) -> tuple[Any, ...]:
        given = self.example_inputs
        return (given,) if isinstance(given, Tensor) else tuple(given)

    def _run_one(self, number: int, step: AnyPass, gm: fx.GraphModule) -> PassRecord:
        name = name_of(step)
        text = graph_text(gm) if self.dump_dir is not None else ""
        before = share_graph(gm) if self.verify else None
        count = len(gm.graph.nodes)
        started = time.perf_counter()
        result = step(gm)
        seconds = time.perf_counter() - started
        if result is not None and result.graph_module is not gm:
            raise PassError(f"pass {name!r} returned another module; passes here work in place")
        if self.dump_dir is not None:
            _dump(Path(self.dump_dir) / f"{number:02d}-{name}", text, graph_text(gm))
        allowed = step.tolerance if isinstance(step, Pass) else self.foreign_tolerance
        error = None
        if before is not None and allowed is not None:
            error, rounding = self._error(step, before, gm)
            # what is no exact rewrite is rounded anew, in 16 bits by more than it declares
            allowed = max(allowed, rounding) if allowed else allowed
            if not error <= allowed:
                raise PassError(
                    f"pass {name!r} changes what the graph computes: outputs differ by {error:.2e}"
                    f" of the largest, allowed is {allowed:g}"
                )
        modified = result is not None and bool(result.modified)
        return PassRecord(
            name,
            modified,
            seconds,
            count,
            len(gm.graph.nodes),
            error,
            allowed if self.verify else None,
        )

    def _error(
        self, step: AnyPass, before: fx.GraphModule, after: fx.GraphModule
    ) -> tuple[float, float]:
        """By how much outputs differ, and two units in the last place of 16 bits if they have these."""
        want = step.expected(before, after) if isinstance(step, Pass) else before
        args, kwargs = self._inputs(), dict(self.example_kwargs)
        wanted = _outputs(want, args, kwargs)
        halves = {x.dtype for x in wanted} & {torch.float16, torch.bfloat16}
        rounding = max((2 * torch.finfo(kind).eps for kind in halves), default=0.0)
        return _difference(_outputs(after, args, kwargs), wanted), rounding


def check_order(passes: Sequence[AnyPass], gm: fx.GraphModule | None = None) -> None:
    """Refuse an order in which a pass comes before one that it needs.

    Args:
        passes: The order.
        gm: The module that it is for, whose earlier passes count; None for a fresh one.

    Raises:
        PassError: Names the pass and what is missing before it, or what is no pass.
    """
    known: set[str] = set()
    for step in passes:
        if not callable(step):
            raise PassError(f"{step!r} is no pass: it cannot be called with a graph module")
        if isinstance(step, Pass):
            absent = [needed.name for needed in step.after if needed.name not in known]
            if gm is not None:
                absent = [name for name in missing_passes(step, gm) if name in absent]
            if absent:
                raise PassError(
                    f"pass {step.name!r} must come after {absent}, which"
                    f" {'are' if len(absent) > 1 else 'is'} not before it in"
                    f" {[name_of(other) for other in passes]}"
                )
            known |= {step.name, *(other.name for other in step.provides)}


def run_passes(gm: fx.GraphModule, passes: Sequence[AnyPass]) -> bool:
    """Run `passes` in order on `gm`, in place; returns whether any changed the graph."""
    return PassManager(passes).run(gm).modified


def _dump(folder: Path, before: str, after: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), "before", "after"
    )
    texts = {"before.txt": before, "after.txt": after, "changes.diff": "".join(lines)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _outputs(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    training = gm.training
    gm.eval()
    try:
        with torch.no_grad():
            result = gm(*args, **kwargs)
    finally:
        gm.train(training)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _difference(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    if len(made) != len(wanted):
        return float("inf")
    worst = 0.0
    for a, b in zip(made, wanted, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not b.numel():
            continue
        got, want = a.detach().to(torch.float64), b.detach().to(torch.float64)
        gap = (got - want).abs()
        gap[(got == want) | (got.isnan() & want.isnan())] = 0
        scale = float(want[want.isfinite()].abs().max()) if bool(want.isfinite().any()) else 0.0
        error = float(gap.max()) / scale if scale > 0 else float(gap.max())
        worst = float("inf") if error != error else max(worst, error)
    return worst
