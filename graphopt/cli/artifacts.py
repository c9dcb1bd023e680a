"""Targets by suffix, and what is said of an artifact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import typer
from typing_extensions import Unpack

from graphopt import errors
from graphopt.backends.base import Artifact
from graphopt.backends.registry import NEUTRAL, Target, target_of_suffix, targets
from graphopt.backends.sets import SetArtifact
from graphopt.backends.verification import Verification
from graphopt.cli.common import is_stream, scratch_folder, to_stdout

__all__ = [
    "Checks",
    "Limit",
    "backend_of",
    "check_limit",
    "check_output",
    "plain",
    "sentence",
    "write",
]

Limit = Annotated[
    float | None,
    typer.Option(help="Fail (exit code 8) above this max|a−b|/max|b| of the outputs."),
]


class Checks(TypedDict, total=False):
    """How `Artifact.save` compares what it wrote."""

    verify: bool | Iterable[Any]
    max_error: float | None


def backend_of(path: Path) -> Target:
    """The target that a path's suffix names; "-" is a program in our own ops."""
    if is_stream(path):
        return NEUTRAL
    try:
        return target_of_suffix(path.suffix)
    except errors.LoweringError:
        known = sorted(target.suffix for target in targets())
        raise errors.LoweringError(
            f"cannot tell the target of {path.name}; suffixes are {known}"
        ) from None


def check_output(output: Path, backend: Target | None, *, overwrite: bool) -> Target:
    """The target, before any work is done.

    Raises:
        LoweringError: The suffix is another target's.
        ArtifactExistsError: The output exists.
    """
    target = backend or backend_of(output)
    if is_stream(output):
        if target != NEUTRAL:
            raise errors.LoweringError(
                f"only {NEUTRAL.suffix} goes to standard output, not {target.suffix}"
            )
        return target
    if output.suffix != target.suffix:
        raise errors.LoweringError(f"{output.name} must end in {target.suffix} for {target}")
    if output.exists() and not overwrite:
        raise errors.ArtifactExistsError(f"{output} exists; pass --overwrite to replace it")
    return target


def check_report(path: Path, suffixes: Sequence[str], *, overwrite: bool) -> None:
    """Whether a report can be written there, before any work is done.

    Raises:
        ConfigError: It has another suffix.
        ArtifactExistsError: The file exists.
    """
    if path.suffix not in suffixes:
        raise errors.ConfigError(f"{path.name} must end in {' or '.join(suffixes)}")
    if path.exists() and not overwrite:
        raise errors.ArtifactExistsError(f"{path} exists; pass --overwrite to replace it")


def write(
    artifact: Artifact | SetArtifact, output: Path, *, overwrite: bool, **checks: Unpack[Checks]
) -> None:
    """Save an artifact, or write it to standard output.

    Args:
        artifact: What to write.
        output: Where to.
        overwrite: Replace what is there.
        checks: As for the `save` of it.
    """
    save: Any = artifact.save
    if is_stream(output):
        save(scratch_folder() / f"stdout{artifact.suffix}", **checks)
        assert artifact.path is not None
        to_stdout(artifact.path)
    else:
        save(output, overwrite=overwrite, **checks)


def plain(outcome: Verification) -> dict[str, Any]:
    """An outcome as plain values."""
    return {
        "max_error": outcome.max_error,
        "outputs": list(outcome.outputs),
        "how": outcome.how,
        "complete": outcome.complete,
        "notes": list(outcome.notes),
        "weights": outcome.weights,
        "holds": outcome.holds,
    }


def sentence(outcome: Verification) -> str:
    """An outcome for people."""
    notes = "".join(f"; {note}" for note in outcome.notes)
    if not outcome.complete:
        return f"{outcome.how}: {outcome.weights} compressed weights, a partial check{notes}"
    return f"{outcome.how}: outputs differ by {outcome.max_error:.2e} of the largest{notes}"


def check_limit(outcome: Verification | None, max_error: float | None) -> None:
    """Refuse an artifact that differs by more than allowed.

    Raises:
        VerificationError: It does, or was checked only in part.
    """
    if outcome is None or max_error is None:
        return
    if not outcome.complete or not outcome.max_error <= max_error:
        raise errors.VerificationError(f"{sentence(outcome)}; allowed is {max_error:g}")
