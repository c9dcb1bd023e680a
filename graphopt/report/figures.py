"""Figures of matplotlib in files whose bytes say nothing but what is drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from graphopt.errors import InputError
from graphopt.extras import require

__all__ = ["save_figure"]

# what says when a file was written, by format
_DATES = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def save_figure(figure: Any, target: Path | io.StringIO, kind: str, **options: Any) -> None:
    """Write a figure; equal figures have equal bytes.

    Args:
        figure: A matplotlib figure.
        target: Where to.
        kind: Format: "svg", "png", "pdf", …
        options: Of `Figure.savefig`.

    Raises:
        InputError: matplotlib does not write that format.
    """
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise InputError(f"no picture can end in .{kind}; use one of {', '.join(sorted(known))}")
    matplotlib = require("matplotlib", "plot")
    # names of parts of an SVG are hashes with a random salt
    with matplotlib.rc_context({"svg.hashsalt": "graphopt"}):
        figure.savefig(target, format=kind, metadata=_DATES.get(kind), **options)
