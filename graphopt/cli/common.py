"""What the commands share: consoles, options, JSON, programs on standard input and output."""

from __future__ import annotations

import atexit
import inspect
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from graphopt.capture.archive_check import trusting
from graphopt.errors import InputError
from graphopt.ir.records import finite_values
from graphopt.run.workers import Workers, dask_workers
from graphopt.specs.options import Options

__all__ = [
    "ERR",
    "OUT",
    "Cluster",
    "Json",
    "Model",
    "is_stream",
    "print_json",
    "reading",
    "scratch_folder",
    "to_stdout",
]

OUT = Console()
ERR = Console(stderr=True)


Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="Load .pt2 files as they are; what is in them can run. For one's own only."
    ),
]


def reading(function: Callable[..., None]) -> Callable[..., None]:
    """A command that reads programs: the function with the option `--trust`."""
    signature = inspect.signature(function)
    hints = get_type_hints(function, include_extras=True)

    def command(*, trust: bool = False, **given: Any) -> None:
        with trusting(trust):
            function(**given)

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        for name, parameter in signature.parameters.items()
    ]
    kind = inspect.Parameter.KEYWORD_ONLY
    own = inspect.Parameter("trust", kind, default=False, annotation=Trust)
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature([*parameters, own])  # type: ignore[attr-defined]
    command.__annotations__ = {field.name: field.annotation for field in (*parameters, own)}
    return command


def is_stream(path: Path) -> bool:
    """Whether a path is "-", which stands for standard input or output."""
    return str(path) == "-"


def scratch_folder() -> Path:
    """A folder that is deleted at exit."""
    folder = Path(tempfile.mkdtemp(prefix="graphopt-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _from_stdin(path: Path) -> Path:
    """The path itself, or a file with what standard input holds."""
    if not is_stream(path):
        if not path.exists():
            raise typer.BadParameter(f"path {str(path)!r} does not exist")
        return path
    stored = scratch_folder() / "stdin.pt2"
    with stored.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return stored


def to_stdout(path: Path) -> None:
    """Copy a file to standard output."""
    with path.open("rb") as file:
        shutil.copyfileobj(file, sys.stdout.buffer)
    sys.stdout.buffer.flush()


@dataclass(frozen=True, kw_only=True)
class Cluster(Options):
    """Machines that take a share of the work.

    Attributes:
        dask: Address of a Dask scheduler whose workers do what is independent, such as tcp://host:8786.
        shared_folder: Folder that all workers see under this path, for weights on their way.
    """

    dask: str | None = None
    shared_folder: Annotated[Path | None, typer.Option(exists=True, file_okay=False)] = None

    def workers(self) -> AbstractContextManager[Workers | None]:
        """Workers of the scheduler; None without one.

        Raises:
            InputError: A folder without a scheduler, or no scheduler answers.
            MissingDependencyError: Dask is not installed.
        """
        if self.shared_folder is not None and self.dask is None:
            raise InputError("--shared-folder is for the workers of --dask")
        return dask_workers(self.dask, self.shared_folder)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Model = Annotated[
    Path,
    typer.Argument(
        help="A .pt2 file of torch.export.save; - reads it from standard input.",
        callback=_from_stdin,
    ),
]


def print_json(value: dict[str, Any], *, stream: Any = None) -> None:
    """Write one object to standard output, or to a stream; figures that are not finite are null."""
    text = json.dumps(finite_values(value), indent=2, default=str, allow_nan=False)
    (stream or sys.stdout).write(text + "\n")
