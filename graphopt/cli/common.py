"""What the commands share: consoles, options, JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

__all__ = ["ERR", "OUT", "Json", "Model", "print_json"]

OUT = Console()
ERR = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Model = Annotated[Path, typer.Argument(help="A .pt2 file of torch.export.save.", exists=True)]


def print_json(value: dict[str, Any]) -> None:
    """Write one object to standard output."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
