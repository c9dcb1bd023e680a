"""Artifacts with several entry points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from graphopt.backends.verification import Verification, merged, verified
from graphopt.capture.archive_check import trusting
from graphopt.errors import ArtifactExistsError, LoweringError, StateError, VerificationError
from graphopt.exclusive import exclusively
from graphopt.files import replaced, stored_size
from graphopt.ir.program import Program, share_graph
from graphopt.ir.program_set import ProgramSet
from graphopt.ir.state import StateTensor, with_state
from graphopt.run.batches import Batch
from graphopt.run.set_calls import method_calls

if TYPE_CHECKING:
    from graphopt.backends.base import Artifact, Backend

__all__ = ["SetArtifact", "own_options"]


def own_options(name: str, programs: ProgramSet, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of one entry point: its own shapes, where they are given by entry point.

    Args:
        name: The entry point.
        programs: All of them.
        options: Those of the set.
    """
    shapes = options.get("shapes")
    if not isinstance(shapes, Mapping) or not shapes or not set(shapes) <= set(programs):
        return dict(options)
    others = {key: value for key, value in options.items() if key != "shapes"}
    return others | ({"shapes": shapes[name]} if name in shapes else {})


class SetArtifact:
    """The entry points of one model, lowered; they share stored weights, and state.

    Attributes:
        programs: What was lowered.
        methods: Entry point → its artifact alone.
        path: Where it was saved, None before.
        verification: How what was saved compared with PyTorch.
    """

    def __init__(
        self, backend: Backend, programs: ProgramSet, methods: Mapping[str, Artifact]
    ) -> None:
        self.backend, self.programs, self.methods = backend, programs, dict(methods)
        self.path: Path | None = None
        self.verification: Verification | None = None

    def __repr__(self) -> str:
        about = "not saved" if self.path is None else str(self.path)
        return f"{type(self).__name__}({', '.join(self.methods)}: {about})"

    @property
    def suffix(self) -> str:
        """What its path ends in."""
        return self.backend.target.suffix

    @exclusively
    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        verify: bool | Iterable[tuple[str, Any]] = True,
    ) -> Path:
        """Write one file with all entry points, compared with the programs in PyTorch.

        Args:
            path: Where to.
            overwrite: Replace what is there.
            verify: (entry point, inputs) of calls, one behind the other; True calls each once with its
                example, in their order, and those of open sizes at the bounds and between; False
                compares nothing.

        Raises:
            ArtifactExistsError: `path` exists and `overwrite` is False.
            LoweringError: The suffix is not the target's.
            VerificationError: It cannot be evaluated, or computes something else; nothing is written.
        """
        target = Path(path)
        if target.suffix != self.suffix:
            raise LoweringError(f"{target.name} must end in {self.suffix}")
        if target.exists() and not overwrite:
            raise ArtifactExistsError(f"{target} exists; pass overwrite=True to replace it")
        with replaced(target) as temporary:
            self.backend.write_set(temporary, self.methods)
            if verify is False:
                self.verification = None
            else:
                sequences = self._examples() if verify is True else [list(verify)]
                with trusting():  # it was written just now
                    self.verification = self._checked(temporary, sequences)
                if not self.verification.holds:
                    raise VerificationError(
                        f"{self.backend.name} computes something else: outputs differ by"
                        f" {self.verification.max_error:.2e} of the largest; nothing was written"
                        f" ({self.verification.how}). Save each of `methods` alone to learn which op"
                    )
        self.path = target
        return target

    @exclusively
    def verify(self, *, calls: Iterable[tuple[str, Any]] | None = None) -> Verification:
        """Evaluate the saved artifact and compare it with the programs in PyTorch.

        Args:
            calls: (entry point, inputs) of each, which goes on from the state that the one before
                left; None calls each once with its example, and at other sizes where they are open.

        Raises:
            InputError: There is no such entry point, or inputs do not fit.
            StateError: The artifact was not saved.
            VerificationError: It cannot be evaluated.
        """
        if self.path is None:
            raise StateError("save the artifact before verifying it")
        return self._checked(self.path, self._examples() if calls is None else [list(calls)])

    @property
    def state(self) -> tuple[StateTensor, ...]:
        """What the entry points share from call to call, with the values before the first."""
        return self.programs.state

    @property
    def size(self) -> int:
        """Bytes on disk.

        Raises:
            StateError: The artifact was not saved.
        """
        if self.path is None:
            raise StateError("save the artifact before asking for its size")
        return stored_size(self.path)

    def _examples(self) -> list[list[tuple[str, Any]]]:
        """Each entry point's example, one behind the other; then those of other sizes, each alone."""
        first = [
            (name, _inputs(program.example_args, program.example_kwargs))
            for name, program in self.programs.methods.items()
        ]
        others = [
            [(name, _inputs(*call))]
            for name, artifact in self.methods.items()
            if artifact.shapes.is_open
            for call in artifact.shapes.calls(self.programs[name])
        ]
        return [first, *others]

    def _checked(self, path: Path, sequences: Iterable[list[tuple[str, Any]]]) -> Verification:
        return merged([self._check(path, calls) for calls in sequences])

    def _check(self, path: Path, calls: Iterable[tuple[str, Any]]) -> Verification:
        steps = list(method_calls(self.programs, calls))
        given: list[tuple[str, Batch]] = [(name, (call[0], call[1])) for name, call in steps]
        evaluations = self.backend.evaluate_set(path, self.programs.methods, given)
        outcomes = []
        for (name, call), evaluation in zip(steps, evaluations, strict=True):
            program = _at(self.programs[name], call.state or {})
            precision = self.methods[name].precision
            outcomes.append(verified(evaluation, program, (call[0], call[1]), precision))
        return replace(merged([replace(each, outputs=(), state=()) for each in outcomes]))


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs if kwargs and not args else args


def _at(program: Program, state: Mapping[str, Tensor]) -> Program:
    """A program whose first call starts from a state."""
    moved = replace(program, graph_module=share_graph(program.graph_module))
    with_state(moved.graph_module, state)
    return moved
