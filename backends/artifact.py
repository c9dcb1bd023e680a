"""What a backend emitted: it is saved, verified and measured."""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn

from torch import fx

from graphopt.analysis.stored_values import stored_values
from graphopt.backends.benchmark import Benchmark, Device, benchmark_of, device_of
from graphopt.backends.compute_plan import ComputePlan, plan_or_none
from graphopt.backends.first_difference import first_difference
from graphopt.backends.sequences import behind, example_calls, sequence_of
from graphopt.backends.shapes import EXAMPLE_SHAPES
from graphopt.backends.verification import (
    Verification,
    merged,
)
from graphopt.capture.archive_check import trusting
from graphopt.errors import (
    ArtifactExistsError,
    GraphOptError,
    InfeasibleError,
    InputError,
    LoweringError,
    StateError,
    VerificationError,
)
from graphopt.exclusive import exclusively
from graphopt.files import replaced, stored_size
from graphopt.ir.program import Program
from graphopt.ir.state import StateTensor
from graphopt.run.batches import Batch, CallSequence, as_captured
from graphopt.specs.artifact import ArtifactSpec

if TYPE_CHECKING:
    from graphopt.backends.base import Backend

_log = logging.getLogger(__name__)
__all__ = ["Artifact", "stored_weights"]


class Artifact(ABC):
    """What a backend emitted, in memory or saved.

    Attributes:
        backend: The backend that made it.
        program: The program that was lowered.
        options: Those of `lower`.
        precision: Float type that it computes in.
        path: Where it was saved, None before.
        shapes: Sizes of the inputs that it takes.
        wanted: The file that the program is for, where it is one of this target.
        verification: How what was saved compared with PyTorch, None where that was turned off.

    Examples:
        >>> artifact = graphopt.lower(program, "torch")
        >>> isinstance(artifact, Artifact), artifact.suffix, artifact
        (True, '.pt2', TorchArtifact(not saved))
        >>> artifact.save("artifact.pt2", verify=False).name
        'artifact.pt2'
        >>> artifact.size > 0
        True
    """

    def __init__(
        self,
        backend: Backend,
        program: Program,
        options: Mapping[str, Any] | None = None,
        precision: str = "float32",
    ) -> None:
        self.backend = backend
        self.program = program
        self.options = dict(options or {})
        self.precision = precision
        self.path: Path | None = None
        self.shapes = EXAMPLE_SHAPES
        self.wanted: ArtifactSpec | None = None
        self.verification: Verification | None = None

    def __repr__(self) -> str:
        about = "not saved" if self.path is None else f"{self.path}, {self.size:,} bytes"
        return f"{type(self).__name__}({about})"

    @property
    def suffix(self) -> str:
        """What its path ends in."""
        return self.backend.target.suffix

    @abstractmethod
    def _write(self, path: Path) -> None:
        """Write to a path that does not exist yet."""

    def _put(self, path: Path) -> None:
        """Write, with errors of the target's own writer as ours."""
        try:
            self._write(path)
        except (GraphOptError, OSError):
            raise
        except Exception as error:
            raise LoweringError(
                f"{self.backend.name} could not write {path.suffix}: {type(error).__name__}: {error}"
            ) from error

    @exclusively
    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        verify: bool | Iterable[Any] = True,
        max_error: float | None = None,
    ) -> Path:
        """Write the artifact once it has been compared with the program in PyTorch.

        What was written is evaluated as the target does, before it gets its name: a failure leaves
        nothing behind, and what was there untouched. See `Verification.holds` for the rule.

        Args:
            path: Where to.
            overwrite: Replace what is there.
            verify: Calls to compare on, each the inputs of one call: a tensor, a tuple of positional
                ones or a dict of keyword ones; or a `CallSequence`. True takes the program's example,
                three times in a row where the program has state; False compares nothing.
            max_error: Largest max|a − b| / max|b| of an output, beside the rule.

        Raises:
            ArtifactExistsError: `path` exists and `overwrite` is False.
            OutputError: It cannot be written.
            LoweringError: The suffix is not the target's, or the target's writer fails.
            InfeasibleError: It has more bytes than the file that the program is for may have.
            VerificationError: It cannot be evaluated, or computes something else; the message names
                the first op whose value differs.
        """
        target = Path(path)
        if target.suffix != self.suffix:
            raise LoweringError(f"{target.name} must end in {self.suffix}")
        if target.exists() and not overwrite:
            raise ArtifactExistsError(f"{target} exists; pass overwrite=True to replace it")
        with replaced(target) as temporary:
            self._put(temporary)
            self._refuse_larger(stored_size(temporary))
            if verify is False:
                self.verification = None
            else:
                with trusting():  # it was written just now
                    self.verification = self._compared(temporary, verify, max_error)
        self.path = target
        return target

    def _refuse_larger(self, size: int) -> None:
        """Hold to the budget of the file that the program is for.

        Raises:
            InfeasibleError: The file has more bytes.
        """
        wanted = self.wanted
        if wanted is None or wanted.max_bytes is None or size <= wanted.max_bytes:
            return
        changed = {
            name: value
            for name, value in self.options.items()
            if name not in wanted.lowering or wanted.lowering[name] != value
        }
        advice = f"the nearest that this program fits is {size:,} bytes; ask the recipe for"
        advice += f" target_bytes={2 * wanted.max_bytes - size:,} to get within the budget"
        if changed:
            advice = (
                f"the recipe counted on {dict(wanted.lowering)}, and {changed} was given instead"
            )
        raise InfeasibleError(
            f"the file has {size:,} bytes, {size - wanted.max_bytes:,} above the budget of"
            f" {wanted.max_bytes:,}; nothing was written; {advice}"
        )

    def _compared(
        self, path: Path, verify: bool | Iterable[Any], max_error: float | None
    ) -> Verification:
        """The outcome of comparing what was written, if it is what it should be.

        Raises:
            VerificationError: It is not.
        """
        if isinstance(verify, bool):
            sequences = example_calls(self.program, self.shapes)
        else:
            sequences = [sequence_of(call) for call in verify]
        outcomes = []
        for calls in sequences:
            outcomes.append(self._check(path, calls))
            if not outcomes[-1].holds:
                self._refuse(calls, outcomes[-1])
        outcome = merged(outcomes)
        if max_error is not None and not (outcome.complete and outcome.max_error <= max_error):
            raise VerificationError(
                f"{outcome.how}: outputs differ by {outcome.max_error:.2e} of the largest; allowed is"
                f" {max_error:g}; nothing was written"
            )
        if not outcome.complete:
            _log.warning("%s: %s", self.backend.name, "; ".join((outcome.how, *outcome.notes)))
        return outcome

    def _refuse(self, calls: Sequence[Batch], outcome: Verification) -> NoReturn:
        """Say which op it is that comes out otherwise."""
        number = outcome.failed or 0
        program = behind(self.program, calls[:number])
        program = program.with_example(*as_captured(program.graph_module, calls[number]))
        first = first_difference(program, self._differs)
        where = f"; the first op whose value differs is {first}" if first else ""
        where += f", in call {number} of a sequence" if number else ""
        raise VerificationError(
            f"{self.backend.name} computes something else: outputs differ by"
            f" {outcome.max_error:.2e} of the largest{where}; nothing was written ({outcome.how})."
            " Leave that op out or write it otherwise; verify=False writes the artifact as it is"
        )

    def _differs(self, part: Program) -> bool | None:
        """Whether a part of the program comes out otherwise; None where the target refuses it."""
        try:
            with TemporaryDirectory() as folder:
                artifact = self.backend.lower(part, **self.options)
                path = Path(folder) / f"part{self.suffix}"
                artifact._put(path)
                outcome = artifact._check(path, [(part.example_args, part.example_kwargs)])
        except GraphOptError:
            return None
        return outcome.complete and not outcome.holds

    def _check(self, path: Path, calls: Sequence[Batch]) -> Verification:
        captured = [as_captured(self.program.graph_module, call) for call in calls]
        return self.backend.check_sequence(path, self.program, captured, precision=self.precision)

    @property
    def state(self) -> tuple[StateTensor, ...]:
        """What the artifact keeps from call to call, with the values before the first."""
        return self.program.state

    @exclusively
    def verify(
        self, *inputs: Any, calls: Iterable[Any] | None = None, **kwargs: Any
    ) -> Verification:
        """Evaluate the saved artifact and compare it with the program in PyTorch.

        Args:
            inputs: Inputs of one call, or one tuple of them; none takes the program's example, at
                the smallest, a middle and the largest size where sizes are open.
            calls: A sequence of calls instead, each a tensor, a tuple of positional inputs or a dict
                of keyword ones: every call goes on from the state that the one before left.
            kwargs: Keyword inputs.

        Raises:
            InputError: Both are given.
            StateError: The artifact was not saved.
            VerificationError: It cannot be evaluated.
        """
        if self.path is None:
            raise StateError("save the artifact before verifying it")
        if calls is not None:
            if inputs or kwargs:
                raise InputError("give the inputs of one call, or `calls`")
            return self._check(self.path, sequence_of(CallSequence(calls)))
        if len(inputs) == 1 and isinstance(inputs[0], tuple | list):
            inputs = tuple(inputs[0])
        tried = [[(tuple(inputs), dict(kwargs))]]
        if not inputs and not kwargs:
            tried = example_calls(self.program, self.shapes)
        return merged([self._check(self.path, sequence) for sequence in tried])

    @exclusively
    def benchmark(
        self, *inputs: Any, device: str | Device = "m1", runs: int = 20, **kwargs: Any
    ) -> Benchmark:
        """Time a call of the saved artifact, or estimate it where the target does not run here.

        ExecuTorch, ONNX and PyTorch are timed; on macOS also Core ML and Core AI, whose own plans say
        which device computes each op and what share of the time it takes. Elsewhere the time is the
        lower bound of a roofline: operations by the device's rate, or bytes by its bandwidth, whichever
        is longer.

        Args:
            inputs: Inputs of one call, or one tuple of them; none takes the program's example.
            device: What to estimate for: a name of `graphopt.backends.DEVICES`, or a `Device`.
            runs: How often a call is timed.
            kwargs: Keyword inputs.

        Raises:
            StateError: The artifact was not saved.
            InputError: There is no such device, or fewer than one run.
            VerificationError: It does not run.
        """
        if self.path is None:
            raise StateError("save the artifact before timing it")
        if runs < 1:
            raise InputError(f"runs must be at least 1, not {runs}")
        device = device_of(device)
        if len(inputs) == 1 and isinstance(inputs[0], tuple | list):
            inputs = tuple(inputs[0])
        given = (tuple(inputs), dict(kwargs))
        if not inputs and not kwargs:
            given = (self.program.example_args, self.program.example_kwargs)
        call = as_captured(self.program.graph_module, given)
        run = self.backend.runner(self.path, self.program, call)
        width = 2 if self.precision in ("float16", "bfloat16") else None
        try:
            outcome = benchmark_of(
                self.program, call, run, runs=runs, device=device, file_bytes=self.size, width=width
            )
            plan = None
            if run is not None:
                plan = plan_or_none(self.backend.name, functools.partial(self._plan, run, runs))
        finally:
            getattr(run, "close", lambda: None)()
        return replace(outcome, planned_memory=self.planned_memory, plan=plan)

    def _plan(self, run: Callable[[], object], runs: int) -> ComputePlan | None:
        """What the target tells of its ops; None where it tells nothing.

        Args:
            run: What was timed.
            runs: How often.

        Raises:
            Exception: Whatever the target's planner raises.
        """
        del run, runs
        return None

    @property
    def planned_memory(self) -> int | None:
        """Bytes that the runtime sets aside for values; None where the target does not tell."""
        return None

    @property
    def size(self) -> int:
        """Bytes on disk.

        Raises:
            StateError: The artifact was not saved.
        """
        if self.path is None:
            raise StateError("save the artifact before asking for its size")
        return stored_size(self.path)


def stored_weights(gm: fx.GraphModule) -> int:
    """Number of weights that a program stores compressed."""
    return sum(not value.nested for value in stored_values(gm))
