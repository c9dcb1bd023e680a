"""What every backend offers: capabilities, refusals, legalization, lowering, verification."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx
from typing_extensions import Unpack

from graphopt.audited import own_module
from graphopt.backends.artifact import Artifact, stored_weights
from graphopt.backends.capabilities import Capabilities
from graphopt.backends.complex_numbers import in_real_parts
from graphopt.backends.delegate import Delegate
from graphopt.backends.float_types import as_float32, lacking
from graphopt.backends.options import LoweringKeywords, TargetOptions, read_options
from graphopt.backends.registry import Target, target_of_class
from graphopt.backends.sets import SetArtifact, own_options
from graphopt.backends.verification import (
    Evaluation,
    Verification,
    verified_sequence,
)
from graphopt.errors import (
    LoweringError,
    VerificationError,
)
from graphopt.files import stored_size
from graphopt.ir.program import Program
from graphopt.ir.program_set import ProgramSet
from graphopt.ir.state import state_of
from graphopt.passes.pass_base import Pass
from graphopt.run.batches import Batch
from graphopt.schemes.sizes import Parts
from graphopt.specs.storage import StorageRules

__all__ = [
    "Artifact",
    "Backend",
    "stored_size",
    "stored_weights",
]


class Backend(ABC):
    """A target toolchain.

    Attributes:
        name: Its name in messages.
        capabilities: What it can hold.
        options: What `lower` takes as keywords.
        delegate_type: The target as a delegate inside ExecuTorch programs, where it is one.

    Examples:
        >>> from graphopt.backends import load_backend
        >>> isinstance(load_backend("torch"), Backend), load_backend("torch").name
        (True, 'Torch')
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

    def remarks_on(self, gm: fx.GraphModule) -> list[str]:
        """What people should know who lower a module of `legalize`'s ops by the toolchain's own calls."""
        del gm
        return []

    def raise_(self) -> tuple[Pass, ...]:
        """Passes that turn the target's ops back into our vocabulary, by the ops' names alone.

        They run on any program that is read, so they need no toolchain; () where `legalize` leaves
        no ops of the target's own.
        """
        return ()

    @abstractmethod
    def lower(self, program: Program, **options: Unpack[LoweringKeywords]) -> Artifact:
        """Translate a program in our vocabulary.

        Args:
            program: It is not changed.
            options: Fields of the target's `options`.

        Raises:
            LoweringError: There is no such option, or the target cannot hold the program; raised
                before any file is written.
        """

    def lower_set(self, programs: ProgramSet, **options: Unpack[LoweringKeywords]) -> SetArtifact:
        """Translate the entry points of one model, which share weights and state.

        Args:
            programs: They are not changed.
            options: Fields of the target's `options`, for all of them; `shapes` may be {entry point:
                its shapes}, the others having those of their examples.

        Raises:
            LoweringError: The target cannot hold one of them.
        """
        methods = {
            name: self.lower(each, **own_options(name, programs, options))
            for name, each in programs.methods.items()
        }
        return SetArtifact(self, programs, methods)

    def write_set(self, path: Path, methods: Mapping[str, Artifact]) -> None:
        """Write the artifacts of several entry points as one, shared weights once.

        Args:
            path: It does not exist yet.
            methods: Entry point → its artifact.

        Raises:
            LoweringError: The target has one entry point only.
        """
        del path
        raise LoweringError(
            f"{self.name} has one entry point; save {list(methods)} as artifacts of their own"
        )

    def evaluate_set(
        self, path: Path, programs: Mapping[str, Program], calls: Sequence[tuple[str, Batch]]
    ) -> list[Evaluation]:
        """Compute the outputs of calls of several entry points, one behind the other.

        Args:
            path: What `write_set` wrote.
            programs: What it was made from.
            calls: (entry point, inputs) of each.

        Raises:
            VerificationError: It cannot be evaluated.
        """
        raise VerificationError(f"{self.name}: {path.name} has one entry point")

    def evaluate(self, path: Path, program: Program, call: Batch) -> Evaluation:
        """Compute the outputs of the artifact at `path` as the target does.

        A target implements this one where it keeps no state, else `evaluate_sequence`.

        Args:
            path: What was saved.
            program: What it was made from; its graph has the names of the inputs.
            call: Inputs.

        Raises:
            VerificationError: It cannot be evaluated.
        """
        raise VerificationError(f"{self.name}: {path.name} cannot be evaluated")

    def evaluate_sequence(
        self, path: Path, program: Program, calls: Sequence[Batch]
    ) -> list[Evaluation]:
        """Compute the outputs of calls of which each goes on from the state of the one before.

        Args:
            path: What was saved.
            program: What it was made from.
            calls: Inputs of each.

        Raises:
            VerificationError: It cannot be evaluated, or not over several calls.
        """
        if len(calls) > 1 and state_of(program.graph_module):
            raise VerificationError(f"{self.name}: no state is kept over several calls")
        return [self.evaluate(path, program, call) for call in calls]

    def runner(self, path: Path, program: Program, call: Batch) -> Callable[[], object] | None:
        """What computes a call of the artifact at `path`, loaded already, so that it can be timed.

        Args:
            path: What was saved.
            program: What it was made from.
            call: Inputs.

        Returns:
            A function of nothing; None where the target's own runtime is not on this machine.

        Raises:
            VerificationError: It does not load.
        """
        del path, program, call
        return None

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
        return self.check_sequence(path, program, [(args, kwargs)], precision=precision)

    def check_sequence(
        self,
        path: Path,
        program: Program,
        calls: Sequence[Batch],
        *,
        precision: str = "float32",
    ) -> Verification:
        """Like `check`, over calls of which each goes on from the state of the one before."""
        evaluations = self.evaluate_sequence(path, program, calls)
        return verified_sequence(evaluations, program, calls, precision)

    def delegate(self, **options: Unpack[LoweringKeywords]) -> Delegate:
        """This target as a delegate inside ExecuTorch programs.

        Args:
            options: As for `lower`.

        Raises:
            LoweringError: It is none.
        """
        if self.delegate_type is None:
            raise LoweringError(f"{self.name} is no delegate of ExecuTorch programs")
        return self.delegate_type(read_options(self.options, self.name, options))

    def held(self, lowering: Mapping[str, Any]) -> Capabilities:
        """What artifacts can hold that are made with these options of `lower`."""
        del lowering
        return self.capabilities

    def options_among(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the given options that `lower` takes together."""
        known = [field.name for field in fields(self.options)]
        return {name: value for name, value in given.items() if name in known}

    def storage(self, options: Mapping[str, Any], floats: torch.dtype) -> StorageRules:
        """What decides the sizes of weights in an artifact.

        Args:
            options: Those of `lower`.
            floats: Float type of the program's weights.

        Raises:
            LoweringError: There is no such option.
        """
        chosen = read_options(self.options, self.name, options)
        wide = torch.float32 if floats in self.capabilities.lacks else floats
        kind = torch.float16 if chosen.float_type == "float16" else wide
        return replace(self.capabilities.storage, float_dtype=kind)

    def stored_bits(
        self,
        parts: Parts,
        rules: StorageRules,
        options: Mapping[str, Any],
        reader: fx.Node | None = None,
        *,
        rounded: bool = False,
    ) -> int:
        """Bits that an artifact stores of one compressed weight.

        Args:
            parts: What is stored of it in our own vocabulary.
            rules: What `storage` gave, perhaps with other float types.
            options: Those of `lower`.
            reader: The op that reads it; None is a linear layer.
            rounded: Whether the op computes with rounded activations.
        """
        del options, reader, rounded
        return parts.bits(rules)

    def refuse_unsupported(self, program: Program, **options: Unpack[LoweringKeywords]) -> None:
        """Raise once with everything that the target cannot hold.

        Args:
            program: In our vocabulary.
            options: Those of `lower`, where what the target holds depends on them.

        Raises:
            LoweringError: There is something.
        """
        del options
        program = in_real_parts(program, self.capabilities.complex_numbers)
        if lacking(program, self.capabilities.lacks):
            program = as_float32(program.copy(), self.capabilities.lacks, quiet=True)
        reasons = self.unsupported(program)
        if reasons:
            raise LoweringError(f"{self.name} cannot hold this program:\n" + "\n".join(reasons))


def __getattr__(name: str) -> object:
    # the table of what has moved stands above
    value: object = own_module("graphopt.moved").moved_name(__name__, name)
    return value
