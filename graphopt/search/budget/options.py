"""Options of `graphopt.fit`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from graphopt.backends.registry import ExportBackend
from graphopt.errors import InputError
from graphopt.search.mixed_precision.options import Candidates, Mode
from graphopt.specs.options import Options

__all__ = ["FitKeywords", "FitOptions"]


@dataclass(frozen=True, kw_only=True)
class FitOptions(Options):
    """How an artifact of a size is found.

    Attributes:
        backend: Target; the output's suffix decides when omitted.
        candidates: What every layer can become; None for what the target holds of palettes of 1 to 8
            bits, of vectors, int4 and int8.
        mode: How sensitivities are found. As for `analyze`.
        lowering: Options of the target.
        held_out: Share of the calls that nothing is fitted to, on which the error is measured.
        verify: Evaluate what is saved and compare, before it gets its name.
        overwrite: Replace the output.
        seed: Seed of everything that is drawn.
        progress: Show bars; None shows them on a terminal.
    """

    backend: ExportBackend | str | None = None
    candidates: Candidates | None = None
    mode: Mode = "fast"
    lowering: Mapping[str, Any] | None = None
    held_out: float = 0.2
    verify: bool = True
    overwrite: bool = False
    seed: int = 0
    progress: bool | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise InputError(f"held_out is a share of the calls below 1, got {self.held_out}")


class FitKeywords(TypedDict, total=False):
    """The options of `FitOptions` as keywords of a call."""

    backend: ExportBackend | str | None
    candidates: Candidates | None
    mode: Mode
    lowering: Mapping[str, Any] | None
    held_out: float
    verify: bool
    overwrite: bool
    seed: int
    progress: bool | None
