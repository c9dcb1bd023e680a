"""Pipeline: passes in an order that is checked, as a value that can be changed and run anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from typing_extensions import Unpack

from graphopt.backends.lowering import as_program
from graphopt.compressors.compressed_program import CompressedProgram, compressed
from graphopt.errors import InputError
from graphopt.ir.program import Program
from graphopt.passes.pass_base import PassResult
from graphopt.passes.pass_manager import (
    AnyPass,
    PassManager,
    PassReport,
    check_order,
    name_of,
)
from graphopt.prepared.findings import FindingsKeywords, keep_findings
from graphopt.specs.artifact import ArtifactSpec

__all__ = ["PausedRun", "Pipeline"]


@dataclass(frozen=True)
class Pipeline(Sequence[AnyPass]):
    """Passes in an order that is checked whenever one is made.

    Every change returns a new pipeline; one in which a pass comes before another that it needs is
    refused with the names of both.

    Attributes:
        name: Name for people.
        passes: Ours, any callable in torch.fx's pass form, or pipelines, whose passes take their
            place.
        artifact: The file that its programs are for; None for any.

    Raises:
        PassError: A pass comes before one that it needs, or is no pass.

    Examples:
        >>> from graphopt import pipelines
        >>> from graphopt.passes import RemoveUnused
        >>> pipeline = pipelines.palettize().insert_after("palettize-weights", RemoveUnused())
        >>> isinstance(pipeline, Pipeline), len(pipeline.run(model, example).report())
        (True, 2)
    """

    name: str
    passes: tuple[AnyPass, ...]
    artifact: ArtifactSpec | None = None

    def __post_init__(self) -> None:
        flat: list[AnyPass] = []
        for step in self.passes:
            flat += step.passes if isinstance(step, Pipeline) else (step,)
        object.__setattr__(self, "passes", tuple(flat))
        check_order(self.passes)

    @overload
    def __getitem__(self, index: int) -> AnyPass: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[AnyPass]: ...
    def __getitem__(self, index: int | slice) -> AnyPass | Sequence[AnyPass]:
        return self.passes[index]

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[AnyPass]:
        return iter(self.passes)

    def __repr__(self) -> str:
        return f"Pipeline({self.name!r}: {len(self)} passes, {self._ends})"

    @property
    def _ends(self) -> str:
        return " … ".join(dict.fromkeys((*self.names[:1], *self.names[-1:]))) or "none"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Run on a graph module in place, as a pass."""
        return PassManager(self.passes)(gm)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the passes, in order."""
        return tuple(name_of(step) for step in self.passes)

    def insert_before(self, name: str, *passes: AnyPass) -> Pipeline:
        """Put passes in front of the first one of that name."""
        return self._changed(self._place(name), 0, passes)

    def insert_after(self, name: str, *passes: AnyPass) -> Pipeline:
        """Put passes behind the last one of that name."""
        self._place(name)
        behind = len(self) - self.names[::-1].index(name)
        return self._changed(behind, 0, passes)

    def replace(self, name: str, *passes: AnyPass) -> Pipeline:
        """Put passes in the place of the first one of that name."""
        return self._changed(self._place(name), 1, passes)

    def without(self, name: str) -> Pipeline:
        """Leave out the first pass of that name."""
        return self._changed(self._place(name), 1, ())

    def reordered(self, names: Sequence[str]) -> Pipeline:
        """The same passes in another order, given by all their names.

        Raises:
            InputError: The names are not those of the passes.
        """
        if sorted(names) != sorted(self.names):
            raise InputError(f"reordered() needs each of {list(self.names)}, got {list(names)}")
        waiting = list(self.passes)
        order = []
        for name in names:
            chosen = next(step for step in waiting if name_of(step) == name)
            waiting.remove(chosen)
            order.append(chosen)
        return replace(self, passes=tuple(order))

    def _place(self, name: str) -> int:
        if name not in self.names:
            raise InputError(f"no pass {name!r} in pipeline {self.name!r}: {list(self.names)}")
        return self.names.index(name)

    def _changed(self, place: int, drop: int, passes: Sequence[AnyPass]) -> Pipeline:
        kept = (*self.passes[:place], *passes, *self.passes[place + drop :])
        return replace(self, passes=kept)

    def run(
        self,
        model: nn.Module | ExportedProgram | Program | str | Path,
        example_inputs: tuple[Any, ...] | Tensor | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        dump_dir: str | Path | None = None,
        verify: bool = False,
        dynamic_shapes: Any = "auto",
    ) -> CompressedProgram:
        """Capture a model and run the passes on it; the model is never changed.

        Args:
            model: A module, an exported program, a `Program` or a .pt2 file.
            example_inputs: Inputs of one call.
            example_kwargs: Keyword inputs of that call.
            dump_dir: Folder for the graph before and after each pass, with a unified diff.
            verify: Compare each pass with its input on the example inputs; see `PassManager`.
            dynamic_shapes: As for `graphopt.capture`, where the model is a module.

        Returns:
            The program; its `pass_report` has times, node counts and errors of each pass.

        Raises:
            CaptureError: The model cannot be exported.
            PassError: A pass computes something else than it must, or left an invalid graph.
        """
        program = as_program(model, example_inputs, example_kwargs, dynamic_shapes)
        manager = PassManager(
            self.passes, dump_dir, verify, program.example_args, program.example_kwargs
        )
        report = manager.run(program.graph_module)
        return compressed(program, report, self.artifact)

    def pause(
        self,
        before: str,
        model: nn.Module | ExportedProgram | Program | str | Path,
        example_inputs: tuple[Any, ...] | Tensor | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
        dynamic_shapes: Any = "auto",
    ) -> PausedRun:
        """Capture a model and run the passes in front of one of them; the model is never changed.

        >>> paused = pipeline.pause("palettize-weights", model, example_inputs)
        >>> program = paused.finish(stored=my_palettes)

        Args:
            before: Name of the pass that comes next, the first one of that name.
            model: A module, an exported program, a `Program` or a .pt2 file.
            example_inputs: Inputs of one call.
            example_kwargs: Keyword inputs of that call.
            dynamic_shapes: As for `graphopt.capture`, where the model is a module.

        Raises:
            CaptureError: The model cannot be exported.
            InputError: There is no such pass.
        """
        place = self._place(before)
        program = as_program(model, example_inputs, example_kwargs, dynamic_shapes)
        report = PassManager(self.passes[:place]).run(program.graph_module)
        return PausedRun(self, place, program, report)


@dataclass(frozen=True)
class PausedRun:
    """A run of a pipeline that waits in front of one of its passes.

    What the pause is for, such as a calibration or a training, looks at `program` and hands its
    results to `finish`, where the passes that wait take them for those of passes before.

    Attributes:
        pipeline: All of it.
        place: Number of the pass that comes next.
        program: What the passes before it have made; it stays as it is.
        report: What they did.
    """

    pipeline: Pipeline
    place: int
    program: Program
    report: PassReport

    def __repr__(self) -> str:
        waits = name_of(self.pipeline.passes[self.place])
        return (
            f"PausedRun({self.pipeline.name!r}: waits before {waits!r}, {self.place} passes done)"
        )

    def followed_by(self, pipeline: Pipeline) -> PausedRun:
        """The run with what a search has decided while it waited.

        Args:
            pipeline: Begins with the passes that have run; its others wait now.

        Raises:
            InputError: It begins with others.
        """
        done = self.pipeline.passes[: self.place]
        if pipeline.passes[: self.place] != done:
            raise InputError(
                f"{pipeline!r} must begin with what has run: {[name_of(step) for step in done]}"
            )
        return replace(self, pipeline=pipeline)

    def finish(
        self, program: Program | None = None, *passes: AnyPass, **results: Unpack[FindingsKeywords]
    ) -> CompressedProgram:
        """Run the passes that wait.

        Args:
            program: What to go on with, rewritten in place: a copy of `program` with tensors that a
                training has moved; None is a copy as it is.
            passes: Each takes the place of the waiting one of its name.
            results: Fields of `graphopt.prepared.findings.Findings`.

        Raises:
            InputError: No pass of that name waits.
        """
        waiting = list(self.pipeline.passes[self.place :])
        names = [name_of(step) for step in waiting]
        for given in passes:
            if name_of(given) not in names:
                raise InputError(f"no pass {name_of(given)!r} waits: {names}")
            waiting[names.index(name_of(given))] = given
        going = self.program.copy() if program is None else program
        keep_findings(going.graph_module, **results)
        report = PassManager(waiting).run(going.graph_module)
        whole = PassReport((*self.report, *report))
        return compressed(going, whole, self.pipeline.artifact)
