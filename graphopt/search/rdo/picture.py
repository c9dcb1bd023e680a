"""The comparison as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.extras import require
from graphopt.files import replaced
from graphopt.report.figures import save_figure
from graphopt.report.names import common_prefix
from graphopt.search.rdo.report import RDOReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST = 32  # letters of a layer's name, its end

__all__ = ["draw_comparison", "require_matplotlib", "save_comparison"]


def require_matplotlib() -> None:
    """Raise before any work where pictures cannot be drawn.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib.figure", "plot")


def draw_comparison(report: RDOReport) -> Figure:
    """Scores, distances and sizes of all forms of the model, and the bits of every layer.

    Raises:
        MissingDependencyError: matplotlib is not installed.

    Examples:
        >>> draw_comparison(optimized.report).savefig("comparison.png")
    """
    figure = require("matplotlib.figure", "plot").Figure(
        figsize=(15, max(4.2, 1.0 + 0.16 * len(report.layers))), layout="constrained"
    )
    scored = all(row.score is not None for row in report.comparison)
    widths = (*((1.0,) if scored else ()), 1.0, 1.0, 1.6)
    *quality, distance, size, layers = figure.subplots(1, len(widths), width_ratios=widths)
    names = [row.name for row in report.comparison]
    colours = ["tab:gray", "tab:orange", "tab:orange", "tab:blue"]
    for axes in quality:
        for row, colour in zip(report.comparison, colours, strict=True):
            axes.errorbar(
                row.name, row.score, yerr=row.error or 0.0, color=colour, marker="o", capsize=4
            )
        axes.set_ylabel("score; standard error of its drop")
        axes.grid(axis="y", alpha=0.3)
    distance.bar(names[1:], [row.distance for row in report.comparison[1:]], color=colours[1:])
    if report.metric in ("kl", "mse") and all(row.distance > 0 for row in report.comparison[1:]):
        distance.set_yscale("log")
    distance.set_ylabel(f"{report.metric} to the float outputs")
    _name_values(distance, [row.distance for row in report.comparison[1:]], "{:.2g}")
    size.bar(names, [row.bits_per_weight for row in report.comparison], color=colours)
    size.set_ylabel("stored bits per weight")
    _name_values(size, [row.bits_per_weight for row in report.comparison], "{:.2f}")
    for axes in (*quality, distance, size):
        axes.tick_params(axis="x", rotation=30)
    rows, bits = range(len(report.layers)), [layer.bits_per_weight for layer in report.layers]
    layers.barh(list(rows), bits)
    prefix = common_prefix([layer.name for layer in report.layers])
    shown = [layer.name.removeprefix(prefix)[-_LONGEST:] for layer in report.layers]
    layers.set_yticks(list(rows), shown, fontsize=7)
    layers.set_ylim(len(shown) - 0.5, -0.5)
    for place, value in zip(rows, bits, strict=True):
        layers.annotate(
            f"{value:.2f}",
            (value, place),
            (3, 0),
            textcoords="offset points",
            fontsize=7,
            va="center",
        )
    layers.margins(x=0.15)
    layers.axvline(report.bits_per_weight, linestyle="--", color="gray")
    layers.set_xlabel("stored bits per weight")
    layers.set_title("layers", fontsize=10)
    return figure


def _name_values(axes: Axes, values: Sequence[float], form: str) -> None:
    """Write the value above each bar."""
    for place, value in enumerate(values):
        axes.annotate(
            form.format(value),
            (place, value),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.margins(y=0.12)


def save_comparison(report: RDOReport, path: Path) -> None:
    """Draw it to an image file."""
    with replaced(path) as temporary:
        save_figure(draw_comparison(report), temporary, temporary.suffix[1:], dpi=130)
