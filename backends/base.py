"""What every backend offers: capabilities, refusals, legalization, lowering, verification."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NoReturn

from torch import fx

from graphopt.analysis.stored_values import stored_values
from graphopt.audited import own_module
from graphopt.backends.capabilities import Capabilities
from graphopt.backends.delegate import Delegate
from graphopt.backends.double_precision import as_float32, has_doubles
from graphopt.backends.first_difference import first_difference
from graphopt.backends.options import TargetOptions, read_options
from graphopt.backends.registry import Target, target_of_class
from graphopt.backends.verification import Evaluation, Verification, merged, verified
from graphopt.capture.archive_check import trusting
from graphopt.errors import (
    ArtifactExistsError,
    GraphOptError,
    LoweringError,
    StateError,
    VerificationError,
)
from graphopt.exclusive import exclusively
from graphopt.files import replaced
from graphopt.ir.program import Program
from graphopt.passes.pass_base import Pass
from graphopt.run.batches import Batch, as_batch, as_captured

_log = logging.getLogger(__name__)
__all__ = [
    "Artifact",
    "Backend",
    "stored_size",
    "stored_weights",
]


class Artifact(ABC):
    """What a backend emitted, in memory or saved.

    Attributes:
        backend: The backend that made it.
        program: The program that was lowered.
        options: Those of `lower`.
        precision: Float type that it computes in.
        path: Where it was saved, None before.
        verification: How what was saved compared with PyTorch, None where that was turned off.
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
        self.verification: Verification | None = None

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
                ones or a dict of keyword ones. True takes the program's example, False compares
                nothing.
            max_error: Largest max|a − b| / max|b| of an output, beside the rule.

        Raises:
            ArtifactExistsError: `path` exists and `overwrite` is False.
            OutputError: It cannot be written.
            LoweringError: The suffix is not the target's, or the target's writer fails.
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
            if verify is False:
                self.verification = None
            else:
                with trusting():  # it was written just now
                    self.verification = self._compared(temporary, verify, max_error)
        self.path = target
        return target

    def _compared(
        self, path: Path, verify: bool | Iterable[Any], max_error: float | None
    ) -> Verification:
        """The outcome of comparing what was written, if it is what it should be.

        Raises:
            VerificationError: It is not.
        """
        example = (self.program.example_args, self.program.example_kwargs)
        calls = [example] if isinstance(verify, bool) else [as_batch(call) for call in verify]
        outcomes = [self._check(path, call) for call in calls]
        for call, outcome in zip(calls, outcomes, strict=True):
            if not outcome.holds:
                self._refuse(call, outcome)
        outcome = merged(outcomes)
        if max_error is not None and not (outcome.complete and outcome.max_error <= max_error):
            raise VerificationError(
                f"{outcome.how}: outputs differ by {outcome.max_error:.2e} of the largest; allowed is"
                f" {max_error:g}; nothing was written"
            )
        if not outcome.complete:
            _log.warning("%s: %s", self.backend.name, "; ".join((outcome.how, *outcome.notes)))
        return outcome

    def _refuse(self, call: Batch, outcome: Verification) -> NoReturn:
        """Say which op it is that comes out otherwise."""
        program = self.program.with_example(*as_captured(self.program.graph_module, call))
        first = first_difference(program, self._differs)
        where = f"; the first op whose value differs is {first}" if first else ""
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
                outcome = artifact._check(path, (part.example_args, part.example_kwargs))
        except GraphOptError:
            return None
        return outcome.complete and not outcome.holds

    def _check(self, path: Path, call: Batch) -> Verification:
        args, kwargs = as_captured(self.program.graph_module, call)
        return self.backend.check(path, self.program, args, kwargs, precision=self.precision)

    @exclusively
    def verify(self, *inputs: Any, **kwargs: Any) -> Verification:
        """Evaluate the saved artifact and compare it with the program in PyTorch.

        Args:
            inputs: Inputs of one call, or one tuple of them; none takes the program's example.
            kwargs: Keyword inputs.

        Raises:
            StateError: The artifact was not saved.
            VerificationError: It cannot be evaluated.
        """
        if self.path is None:
            raise StateError("save the artifact before verifying it")
        if len(inputs) == 1 and isinstance(inputs[0], tuple | list):
            inputs = tuple(inputs[0])
        if not inputs and not kwargs:
            inputs, kwargs = self.program.example_args, self.program.example_kwargs
        return self._check(self.path, (tuple(inputs), dict(kwargs)))

    @property
    def size(self) -> int:
        """Bytes on disk.

        Raises:
            StateError: The artifact was not saved.
        """
        if self.path is None:
            raise StateError("save the artifact before asking for its size")
        return stored_size(self.path)


class Backend(ABC):
    """A target toolchain.

    Attributes:
        name: Its name in messages.
        capabilities: What it can hold.
        options: What `lower` takes as keywords.
        delegate_type: The target as a delegate inside ExecuTorch programs, where it is one.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    options: ClassVar[type[TargetOptions]] = TargetOptions
    delegate_type: ClassVar[type[Delegate] | None] = None

    @property
    def target(self) -> Target:
        """Its row in the registry."""
        return target_of_class(type(self))

    @abstractmethod
    def unsupported(self, program: Program) -> list[str]:
        """Why the target cannot hold the program: tensor, feature and the nearest thing that works."""

    @abstractmethod
    def legalize(self) -> tuple[Pass, ...]:
        """Passes that turn our vocabulary into the target's."""

    def raise_(self) -> tuple[Pass, ...]:
        """Passes that turn the target's ops back into our vocabulary, by the ops' names alone.

        They run on any program that is read, so they need no toolchain; () where `legalize` leaves
        no ops of the target's own.
        """
        return ()

    @abstractmethod
    def lower(self, program: Program, **options: Any) -> Artifact:
        """Translate a program in our vocabulary.

        Args:
            program: It is not changed.
            options: Fields of the target's `options`.

        Raises:
            LoweringError: There is no such option, or the target cannot hold the program; raised
                before any file is written.
        """

    @abstractmethod
    def evaluate(self, path: Path, program: Program, call: Batch) -> Evaluation:
        """Compute the outputs of the artifact at `path` as the target does.

        Args:
            path: What was saved.
            program: What it was made from; its graph has the names of the inputs.
            call: Inputs.

        Raises:
            VerificationError: It cannot be evaluated.
        """

    def check(
        self,
        path: Path,
        program: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        precision: str = "float32",
    ) -> Verification:
        """Evaluate the artifact at `path` on these inputs and compare with `program` in PyTorch.

        Args:
            path: What was saved.
            program: What it should compute.
            args: Inputs.
            kwargs: Keyword inputs.
            precision: Float type that it computes in.

        Raises:
            VerificationError: It cannot be evaluated.
        """
        return verified(
            self.evaluate(path, program, (args, kwargs)), program, (args, kwargs), precision
        )

    def delegate(self, **options: Any) -> Delegate:
        """This target as a delegate inside ExecuTorch programs.

        Args:
            options: As for `lower`.

        Raises:
            LoweringError: It is none.
        """
        if self.delegate_type is None:
            raise LoweringError(f"{self.name} is no delegate of ExecuTorch programs")
        return self.delegate_type(read_options(self.options, self.name, options))

    def options_among(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the given options that `lower` takes together."""
        known = [field.name for field in fields(self.options)]
        return {name: value for name, value in given.items() if name in known}

    def refuse_unsupported(self, program: Program, **options: Any) -> None:
        """Raise once with everything that the target cannot hold.

        Args:
            program: In our vocabulary.
            options: Those of `lower`, where what the target holds depends on them.

        Raises:
            LoweringError: There is something.
        """
        del options
        if not self.capabilities.doubles and has_doubles(program):
            program = as_float32(program.copy(), quiet=True)
        reasons = self.unsupported(program)
        if reasons:
            raise LoweringError(f"{self.name} cannot hold this program:\n" + "\n".join(reasons))


def stored_weights(gm: fx.GraphModule) -> int:
    """Number of weights that a program stores compressed."""
    return sum(not value.nested for value in stored_values(gm))


def stored_size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def __getattr__(name: str) -> object:
    # the table of what has moved stands above
    value: object = own_module("graphopt.moved").moved_name(__name__, name)
    return value
