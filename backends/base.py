"""What every backend offers: capabilities, refusals, legalization, lowering, verification."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.analysis.quantized import find_quantized_activations
from graphopt.analysis.stored_values import find_quantized_weights, stored_values
from graphopt.backends.delegate import Delegate
from graphopt.backends.options import TargetOptions, read_options
from graphopt.backends.registry import Target, target_of_class
from graphopt.errors import ArtifactExistsError, InputError, LoweringError, StateError
from graphopt.files import replaced
from graphopt.ir.program import Program
from graphopt.passes.pass_base import Pass
from graphopt.specs.storage import StorageRules

__all__ = [
    "Artifact",
    "Backend",
    "Capabilities",
    "Verification",
    "compare_outputs",
    "expected_outputs",
    "match_inputs",
    "named_inputs",
    "quantization_refusals",
    "stored_size",
    "stored_weights",
]


@dataclass(frozen=True)
class Capabilities:
    """What a target can hold; refusals quote it and searches read their candidates from it.

    Attributes:
        index_bits: Widths of indices that the target stores as such.
        padded_bits: Width → stored width of those it holds exactly in a wider form.
        grouped: Whether a tensor may have several tables.
        vector: Whether table entries may be longer than one.
        lut_dtypes: Element types of tables.
        channel_scale: Whether a scale may follow the lookup.
        sparse: Whether there is an op for sparse outliers.
        weight_types: Element types of quantized weights, by `shift_scale`'s names; () for none.
        table_types: Element types that are stored as lookups of int8 entries, exactly.
        weight_blocks: Whether scales may run over blocks, not only over channels.
        minimum: Whether quantized weights may have a float minimum (MINVAL).
        activation_types: Element types of activations.
        activation_channels: Whether activations may have one scale per channel.
        fused_activations: Activation functions that are computed together with the quantized op
            before them; None for all.
    """

    index_bits: tuple[int, ...]
    padded_bits: tuple[tuple[int, int], ...] = ()
    grouped: bool = True
    vector: bool = True
    lut_dtypes: tuple[str, ...] = ("float32", "float16")
    channel_scale: bool = True
    sparse: bool = True
    weight_types: tuple[str, ...] = ()
    table_types: tuple[str, ...] = ()
    weight_blocks: bool = True
    minimum: bool = True
    activation_types: tuple[str, ...] = ()
    activation_channels: bool = True
    fused_activations: frozenset[str] | None = None

    @property
    def storage(self) -> StorageRules:
        """What decides the sizes of weights."""
        return StorageRules(self.index_bits, self.padded_bits, self.table_types)

    def stored_bits(self, n_bits: int) -> int | None:
        """Width that an index of `n_bits` takes in the target, None where it cannot hold it."""
        return self.storage.code_bits(n_bits)


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
    """

    max_error: float
    outputs: tuple[float, ...]
    how: str
    complete: bool = True
    notes: tuple[str, ...] = ()
    weights: int = 0


class Artifact(ABC):
    """What a backend emitted, in memory or saved.

    Attributes:
        backend: The backend that made it.
        program: The program that was lowered.
        path: Where it was saved, None before.
    """

    def __init__(self, backend: Backend, program: Program) -> None:
        self.backend = backend
        self.program = program
        self.path: Path | None = None

    @property
    def suffix(self) -> str:
        """What its path ends in."""
        return self.backend.target.suffix

    @abstractmethod
    def _write(self, path: Path) -> None:
        """Write to a path that does not exist yet."""

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the artifact; a failure leaves nothing behind, and what was there untouched.

        Raises:
            ArtifactExistsError: `path` exists and `overwrite` is False.
            LoweringError: The suffix is not the target's.
        """
        target = Path(path)
        if target.suffix != self.suffix:
            raise LoweringError(f"{target.name} must end in {self.suffix}")
        if target.exists() and not overwrite:
            raise ArtifactExistsError(f"{target} exists; pass overwrite=True to replace it")
        with replaced(target) as temporary:
            self._write(temporary)
        self.path = target
        return target

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
        return self.backend.check(self.path, self.program, tuple(inputs), dict(kwargs))

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
    def check(
        self, path: Path, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Verification:
        """Evaluate the artifact at `path` on these inputs and compare with `program` in PyTorch.

        Raises:
            VerificationError: It cannot be evaluated.
        """

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
        reasons = self.unsupported(program)
        if reasons:
            raise LoweringError(f"{self.name} cannot hold this program:\n" + "\n".join(reasons))


def quantization_refusals(gm: fx.GraphModule, allowed: Capabilities) -> list[str]:
    """Why a target cannot hold a graph's quantized weights and activations."""
    reasons = []
    for weight in find_quantized_weights(gm):
        known = (*allowed.weight_types, *allowed.table_types)
        if weight.storage not in known:
            reasons.append(f"{weight.name}: {weight.storage} weights; use one of {known}")
        elif not allowed.weight_blocks and not weight.per_channel:
            reasons.append(
                f"{weight.name}: scales over blocks; use PerChannelGranularity() or"
                " PerTensorGranularity()"
            )
        elif weight.offset == "minimum" and (
            not allowed.minimum or weight.storage in allowed.table_types
        ):
            reasons.append(
                f"{weight.name}: {weight.storage} with a float minimum; use qformulation 'zp'"
            )
        if weight.storage == "fp4_e2m1" and weight.shape[-1] % 2:
            reasons.append(f"{weight.name}: fp4 needs an even last axis, it has {weight.shape[-1]}")
    for activation in find_quantized_activations(gm):
        if activation.storage not in allowed.activation_types:
            reasons.append(
                f"{activation.name}: {activation.storage} activations; use one of"
                f" {allowed.activation_types}"
            )
        if activation.per_channel and not allowed.activation_channels:
            reasons.append(
                f"{activation.name}: one scale per channel; use PerTensorGranularity() for activations"
            )
    return reasons


def stored_weights(gm: fx.GraphModule) -> int:
    """Number of weights that a program stores compressed."""
    return sum(not value.nested for value in stored_values(gm))


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


def named_inputs(
    program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Tensor inputs by the names of the graph's inputs.

    Raises:
        InputError: Their number differs.
    """
    inputs = program.graph_module.graph.find_nodes(op="placeholder")
    # fx appends a number to names such as "input" that are builtins; the target has the plain one
    names = [str(node.target) for node in inputs]
    leaves = pytree.tree_leaves((args, kwargs))
    if len(names) != len(leaves):
        raise InputError(f"the program has inputs {names}, {len(leaves)} values were given")
    pairs = zip(names, leaves, strict=True)
    # a tensor without dimensions has one of size 1 in the targets' programs
    return {
        name: leaf.reshape(leaf.shape or (1,)) for name, leaf in pairs if isinstance(leaf, Tensor)
    }


def match_inputs(wanted: Sequence[str], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs by an artifact's own names: by name where they agree, by position where not.

    Raises:
        InputError: Neither works.
    """
    if all(name in given for name in wanted):
        return {name: given[name] for name in wanted}
    if len(wanted) == len(given):
        return dict(zip(wanted, given.values(), strict=True))
    raise InputError(f"the artifact has inputs {list(wanted)}, the program {list(given)}")


def expected_outputs(
    program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """What the program gives in PyTorch, flattened."""
    with torch.no_grad():
        result = program.graph_module(*args, **kwargs)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def stored_size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def __getattr__(name: str) -> object:
    # the table of what has moved stands above
    value: object = importlib.import_module("graphopt.moved").moved_name(__name__, name)
    return value
