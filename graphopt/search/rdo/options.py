"""RunOptions: where a run of `graphopt.rdo.optimize` writes, and how it goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from graphopt.fitting.evidence import Resources
from graphopt.specs.artifact import read_bytes
from graphopt.specs.options import Options

__all__ = ["RunKeywords", "RunOptions"]


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Where a run writes, and how it goes on.

    Attributes:
        out: Folder to write. It gets report.json, config.yaml, bits.json, comparison.png and
            quantized.pt2 and appears whole at the end; until then finished stages and blocks are
            kept beside it in `.<name>.partial`, from which an interrupted run goes on.
        overwrite: Replace the folder.
        resume: Go on with an unfinished run, or begin anew.
        executor: Where the candidates of a layer are fitted side by side: any
            `concurrent.futures.Executor`, or a Dask client or cluster (`graphopt.Workers`). None fits one
            after the other. Results do not depend on it.
        progress: Show bars; None shows them on a terminal.
        activation_memory: What values between layers may take in memory while blocks are searched and
            fitted, in bytes or as a text such as "2GB"; those beyond lie in files. None keeps all in
            memory. Results do not depend on it. Gradients have `RDOConfig.gradient_memory`.
        work_dir: Folder for these files; None is the system's folder for such.
    """

    out: str | Path | None = None
    overwrite: bool = False
    resume: bool = True
    executor: Any = None
    progress: bool | None = None
    activation_memory: float | str | None = None
    work_dir: str | Path | None = None

    def __post_init__(self) -> None:
        if self.activation_memory is not None:
            read_bytes(self.activation_memory)  # refuse what is no size before any work

    @property
    def resources(self) -> Resources:
        """What values may take, and where the others go."""
        limit = None if self.activation_memory is None else read_bytes(self.activation_memory)
        return Resources(activation_memory=limit, work_dir=self.work_dir)


class RunKeywords(TypedDict, total=False):
    """The options of `RunOptions` as keywords of a call."""

    out: str | Path | None
    overwrite: bool
    resume: bool
    executor: Any
    progress: bool | None
    activation_memory: float | str | None
    work_dir: str | Path | None
