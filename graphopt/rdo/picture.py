"""The comparison as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.extras import require
from graphopt.rdo.report import RDOReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_comparison", "require_matplotlib", "save_comparison"]


def require_matplotlib() -> None:
    """Raise before any work where pictures cannot be drawn.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib.figure", "plot")


def draw_comparison(report: RDOReport) -> Figure:
    """Scores (or distances) and sizes of all forms of the model, and the bits of every layer.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = require("matplotlib.figure", "plot").Figure(figsize=(12, 4.2), layout="constrained")
    quality, size, layers = figure.subplots(1, 3, width_ratios=(1, 1, 1.6))
    names = [row.name for row in report.comparison]
    colours = ["tab:gray", "tab:orange", "tab:orange", "tab:blue"]
    scored = all(row.score is not None for row in report.comparison)
    if scored:
        values = [row.score or 0.0 for row in report.comparison]
        errors = [row.error or 0.0 for row in report.comparison]
        quality.bar(names, values, yerr=errors, color=colours)
        quality.set_ylabel("score")
    else:
        quality.bar(names, [row.distance for row in report.comparison], color=colours)
        quality.set_ylabel(report.metric)
    size.bar(names, [row.bits_per_weight for row in report.comparison], color=colours)
    size.set_ylabel("stored bits per weight")
    for axes in (quality, size):
        axes.tick_params(axis="x", rotation=30)
    layers.bar(range(len(report.layers)), [layer.bits_per_weight for layer in report.layers])
    layers.axhline(report.bits_per_weight, linestyle="--", color="gray")
    layers.set_xlabel("layer")
    layers.set_ylabel("stored bits per weight")
    return figure


def save_comparison(report: RDOReport, path: Path) -> None:
    """Draw it to an image file."""
    draw_comparison(report).savefig(path, dpi=130)
