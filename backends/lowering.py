"""Lowering to a target, and the conversions between programs and modules."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from typing_extensions import Unpack

from graphopt.backends import Artifact, load_backend
from graphopt.backends.base import Backend
from graphopt.backends.listed_once import composites_listed_once
from graphopt.backends.options import LoweringKeywords
from graphopt.backends.raising import RaiseToVocabulary
from graphopt.backends.registry import ExportBackend, target_of, target_of_suffix
from graphopt.backends.sets import own_options
from graphopt.capture import capture
from graphopt.errors import CaptureError, InputError
from graphopt.exclusive import exclusively
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.neutral_form import neutral_form, with_neutral_form
from graphopt.ir.program import Program, share_graph
from graphopt.ir.program_set import ProgramSet
from graphopt.passes import FoldComputedWeights, RemoveUnused
from graphopt.passes.pass_manager import run_passes
from graphopt.specs.artifact import ArtifactSpec

__all__ = ["as_program", "convert_for", "lower", "lower_by_suffix"]

_log = logging.getLogger(__name__)


@exclusively
def as_program(
    source: nn.Module | ExportedProgram | Program | str | Path,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = "auto",
) -> Program:
    """A program in our vocabulary, from whatever is at hand.

    A module that was finalized for a backend is the program that it was made from, where it is as it
    was then; else its ops are raised back. Weights that it computes from constants are stored.

    Args:
        source: What is captured, or a program.
        example_inputs: Inputs of one call.
        example_kwargs: Keyword inputs of that call.
        dynamic_shapes: As for `graphopt.capture`; of a module only.

    Raises:
        CaptureError: It cannot be exported.
        InputError: Example inputs are missing, or a file has several entry points.
    """
    if isinstance(source, Program):
        program = source.copy()
        if example_inputs is not None or example_kwargs:
            args = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs or ()
            program = program.with_example(tuple(args), dict(example_kwargs or {}))
    else:
        if isinstance(source, CapturedModule):
            source = neutral_form(source) or source
        captured: Any = capture(source, example_inputs, example_kwargs, dynamic_shapes)
        if isinstance(captured, ProgramSet):
            raise InputError(
                f"{source} has several entry points ({', '.join(captured)}); take all of them with"
                f" graphopt.capture(path), or one with graphopt.capture(path)[{next(iter(captured))!r}]"
            )
        program = captured
    neutral = neutral_form(program.graph_module)
    if neutral is not None:
        program = replace(program, graph_module=share_graph(neutral))
    run_passes(program.graph_module, [RaiseToVocabulary(), FoldComputedWeights()])
    return program


@exclusively
def convert_for(program: Program, backend: ExportBackend | str) -> CapturedModule:
    """A module that holds the ops of a backend instead of ours, and keeps the program beside them.

    Args:
        program: What it computes; its tensors are taken over, so that nothing lies in memory twice.
        backend: The target.

    Raises:
        LoweringError: The backend cannot hold the program.
    """
    target = load_backend(backend)
    target.refuse_unsupported(program)
    converted = program.copy()
    run_passes(converted.graph_module, [RemoveUnused(), *target.legalize()])
    if not target.legalize():
        return converted.graph_module
    return with_neutral_form(converted.graph_module, program.graph_module)


@exclusively
def lower(
    model: nn.Module | ExportedProgram | Program | ProgramSet | Mapping[str, Any] | str | Path,
    backend: ExportBackend | str,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[LoweringKeywords],
) -> Any:
    """Lower to a target in one call: `graphopt.lower(finalized, "coreai", x).save("m.aimodel")`.

    Args:
        model: A prepared or finalized module, an exported program, a `Program`, a `ProgramSet`, entry
            points as `graphopt.capture` takes them, or a .pt2 file.
        backend: The target.
        example_inputs: Inputs that fix the shapes; a program's own when not given.
        example_kwargs: Keyword inputs.
        options: Options of the backend, see its `lower`; those of a recipe, where the program is for
            this backend, are its defaults.

    Returns:
        An artifact with `save(path)` and `verify(inputs)`; a `SetArtifact` for a set.

    Raises:
        CaptureError: The model cannot be exported.
        LoweringError: The target cannot hold the program.
        MissingDependencyError: The target's packages are not installed.

    Examples:
        >>> artifact = lower(compressed, "torch")
        >>> artifact.save("compressed.pt2").name
        'compressed.pt2'
    """
    target = load_backend(backend)
    if isinstance(model, Mapping):
        model = capture(model)
    if isinstance(model, str | Path):
        model = capture(model, example_inputs, example_kwargs)
    if isinstance(model, ProgramSet):
        for name, each in model.methods.items():
            target.refuse_unsupported(each, **own_options(name, model, options))
        return target.lower_set(model, **options)
    # the fields of a target's options have defaults
    fixed = options.get("shapes", getattr(target.options, "shapes", None)) == "example"
    program = _captured_for_target(model, example_inputs, example_kwargs, fixed)
    wanted = _wanted(program, target)
    given: dict[str, Any] = {**({} if wanted is None else wanted.lowering), **options}
    target.refuse_unsupported(program, **given)
    with composites_listed_once():
        artifact = target.lower(program, **given)
    artifact.wanted = wanted
    return artifact


def _captured_for_target(
    model: nn.Module | ExportedProgram | Program,
    example_inputs: tuple[Any, ...] | Tensor | None,
    example_kwargs: Mapping[str, Any] | None,
    fixed: bool,
) -> Program:
    """A program in our vocabulary; where sizes are fixed a module is captured with them, in half the time."""
    if fixed and isinstance(model, nn.Module):
        try:
            return as_program(model, example_inputs, example_kwargs, None)
        except CaptureError as error:
            # with open sizes it says more of what is wrong
            _log.debug("fixed sizes refused: %s", error)
    return as_program(model, example_inputs, example_kwargs)


def _wanted(program: Program, target: Backend) -> ArtifactSpec | None:
    """The file that a program is for, where it is one of this target."""
    wanted = program.artifact
    if wanted is None or target_of(wanted.backend) == target.target:
        return wanted
    if wanted.max_bytes is not None:
        _log.warning(
            "the program is for %s, within %d bytes; that does not hold for %s",
            wanted.backend,
            wanted.max_bytes,
            target.name,
        )
    return None


def lower_by_suffix(program: Program, suffix: str) -> Artifact:
    """Lower to the target whose files end in `suffix`.

    Raises:
        LoweringError: No target's do.
    """
    return lower(program, target_of_suffix(suffix))
