"""What the commands share: consoles, options, JSON, programs on standard input and output."""

from __future__ import annotations

import atexit
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from graphopt.ir.records import finite_values

__all__ = ["ERR", "OUT", "Json", "Model", "is_stream", "print_json", "scratch_folder", "to_stdout"]

OUT = Console()
ERR = Console(stderr=True)


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
