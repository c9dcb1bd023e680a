"""Charts of tables and sweeps, and what draws them with matplotlib (extra "plot")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.extras import require
from graphopt.files import replaced
from graphopt.report.charts import CurveChart, DotChart
from graphopt.report.figures import save_figure
from graphopt.report.names import common_prefix

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from graphopt.search.mixed_precision.measurements import Measurements
    from graphopt.search.mixed_precision.sweep import Point, Sweep

__all__ = ["chart_of_sweep", "chart_of_table", "plot_sweep", "plot_table", "save_plot"]

_LONGEST = 40  # letters of a layer's name
_ROW = 0.2  # inches


def _with_unit(name: str) -> str:
    """A metric with its unit."""
    return f"{name} (dB)" if name == "psnr" else name


def chart_of_table(table: Measurements, metric: str | None = None) -> DotChart:
    """Each candidate's values over the layers, in the order of the network.

    Args:
        table: Measurements.
        metric: One of those that were measured; None is the first.
    """
    name = metric or table.header.metrics[0]
    values, names = table.values(name), [layer.name for layer in table.layers]
    prefix = common_prefix(names)
    series = []
    for candidate in table.candidates:
        own = [values[layer].get(candidate, math.nan) for layer in names]
        series.append((candidate, tuple(v if math.isfinite(v) else None for v in own)))
    return DotChart(
        title="Each layer compressed alone",
        axis=_with_unit(name),
        names=tuple(layer.removeprefix(prefix) for layer in names),
        series=tuple(series),
        log=name in ("kl", "mse"),
    )


def chart_of_sweep(sweep: Sweep) -> CurveChart:
    """Scores over realised bits per weight: a line per solver, uniform points and the uncompressed level."""
    recipes = sweep.of_kind("recipe")
    solvers = dict.fromkeys(point.label for point in recipes)
    level = next(
        (point for point in sweep.of_kind("uncompressed") if math.isfinite(point.score)), None
    )
    marks = [("uniform", _points(sweep.of_kind("uniform")))] if sweep.of_kind("uniform") else []
    if recipes:
        marks.append((f"knee, {sweep.knee.bits_per_weight:.2f} bits", _points([sweep.knee])))
    return CurveChart(
        title=f"{sweep.score} against size",
        x="bits per weight, tables included",
        y=_with_unit(sweep.score),
        lines=tuple(
            (f"mixed precision, {solver}", _points([p for p in recipes if p.label == solver]))
            for solver in solvers
        ),
        marks=tuple(marks),
        level=None if level is None else ("uncompressed", level.score),
    )


def _points(points: Sequence[Point]) -> tuple[tuple[float, float, str], ...]:
    return tuple((point.bits_per_weight, point.score, point.label) for point in points)


def _axes(ax: Axes | None, width: float, height: float = 4.5) -> Axes:
    if ax is not None:
        return ax
    # no pyplot: a figure of its own changes no global state
    figure = require("matplotlib.figure", "plot").Figure
    return figure(figsize=(width, height), layout="constrained").add_subplot()


def save_plot(ax: Axes, path: str | Path) -> None:
    """Write the figure of some axes, in the format that the path ends in.

    Raises:
        InputError: matplotlib does not write that format.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    with replaced(Path(path)) as temporary:
        save_figure(figure, temporary, temporary.suffix.lower()[1:] or "png", dpi=150)


def plot_table(table: Measurements, ax: Axes | None = None, *, metric: str | None = None) -> Axes:
    """Dots of each candidate, a row per layer from the network's first at the top.

    Args:
        table: Measurements.
        ax: Where to draw; a new figure by default (`ax.figure.savefig(path)`).
        metric: One of those that were measured; None is the first.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    chart = chart_of_table(table, metric)
    ax = _axes(ax, 8.0, max(3.0, 1.2 + _ROW * len(chart.names)))
    rows = range(len(chart.names))
    for name, values in chart.series:
        shown = [math.nan if value is None else value for value in values]
        ax.plot(shown, list(rows), linestyle="none", marker="o", markersize=5, label=name)
    ax.set_yticks(list(rows), [_short(name) for name in chart.names], fontsize=8)
    ax.set_ylim(len(chart.names) - 0.5, -0.5)
    if chart.log:
        ax.set_xscale("log")
    ax.set_xlabel(chart.axis)
    ax.set_title(chart.title)
    ax.grid(axis="both", alpha=0.3)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return ax


def _short(name: str) -> str:
    """A name that fits, its end kept."""
    return name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :]


def plot_sweep(sweep: Sweep, ax: Axes | None = None) -> Axes:
    """Accuracy against realised bits per weight, with uniform points, the uncompressed line and the knee.

    Args:
        sweep: Its points.
        ax: Where to draw; a new figure by default.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    chart = chart_of_sweep(sweep)
    ax = _axes(ax, 7.0)
    for name, points in chart.lines:
        ax.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o", label=name)
    for (name, points), marker in zip(chart.marks, ("s", "*"), strict=False):
        star = name.startswith("knee")
        ax.scatter(
            [x for x, _, _ in points],
            [y for _, y, _ in points],
            marker="*" if star else marker,
            s=180 if star else 36,
            color="tab:red" if star else "tab:orange",
            label=name,
            zorder=4 if star else 3,
        )
        if not star:
            for x, y, label in points:
                ax.annotate(label, (x, y), fontsize=8, xytext=(5, -10), textcoords="offset points")
    if chart.level is not None:
        ax.axhline(chart.level[1], linestyle="--", color="gray", label=chart.level[0])
    ax.set_xlabel(chart.x)
    ax.set_ylabel(chart.y)
    ax.set_title(chart.title)
    ax.margins(x=0.1)
    ax.grid(alpha=0.3)
    ax.legend()
    return ax
