"""Plots of tables and sweeps (extra "plot")."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.extras import require
from graphopt.files import replaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from graphopt.search.mixed_precision.measurements import Measurements
    from graphopt.search.mixed_precision.sweep import Sweep

__all__ = ["plot_sweep", "plot_table", "save_plot"]


def _axes(ax: Axes | None, width: float) -> Axes:
    if ax is not None:
        return ax
    # no pyplot: a figure of its own changes no global state
    figure = require("matplotlib.figure", "plot").Figure
    return figure(figsize=(width, 4.5), layout="constrained").add_subplot()


def save_plot(ax: Axes, path: str | Path) -> None:
    """Write the figure of some axes."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    with replaced(Path(path)) as temporary:
        figure.savefig(temporary, dpi=150)


def plot_table(table: Measurements, ax: Axes | None = None, *, metric: str | None = None) -> Axes:
    """Each candidate's values over the layers.

    Args:
        table: Measurements.
        ax: Where to draw; a new figure by default (`ax.figure.savefig(path)`).
        metric: One of those that were measured; None is the first.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    name = metric or table.header.metrics[0]
    values = table.values(name)
    ax = _axes(ax, max(6.0, 0.16 * len(table.layers)))
    places = range(len(table.layers))
    for candidate in table.candidates:
        own = [values[layer.name].get(candidate, math.nan) for layer in table.layers]
        shown = [value if math.isfinite(value) else math.nan for value in own]
        ax.plot(places, shown, marker="o", markersize=3, linewidth=1, label=candidate)
    ax.set_xticks(list(places), [layer.name for layer in table.layers], rotation=90, fontsize=6)
    if name in ("kl", "mse"):
        ax.set_yscale("log")
    ax.set_ylabel(f"{name} (dB)" if name == "psnr" else name)
    ax.set_title("each layer alone")
    ax.legend()
    return ax


def plot_sweep(sweep: Sweep, ax: Axes | None = None) -> Axes:
    """Accuracy against realised bits per weight, with uniform points, the uncompressed line and the knee.

    Args:
        sweep: Its points.
        ax: Where to draw; a new figure by default.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    ax = _axes(ax, 7.0)
    recipes = sweep.of_kind("recipe")
    ax.plot(
        [point.bits_per_weight for point in recipes],
        [point.score for point in recipes],
        marker="o",
        label="mixed precision",
    )
    flat = sweep.of_kind("uniform")
    if flat:
        ax.scatter(
            [point.bits_per_weight for point in flat],
            [point.score for point in flat],
            marker="s",
            color="tab:orange",
            label="uniform",
            zorder=3,
        )
        for point in flat:
            ax.annotate(
                point.label,
                (point.bits_per_weight, point.score),
                fontsize=7,
                xytext=(4, -8),
                textcoords="offset points",
            )
    for point in sweep.of_kind("uncompressed"):
        if math.isfinite(point.score):
            ax.axhline(point.score, linestyle="--", color="gray", label="uncompressed")
    if recipes:
        knee = sweep.knee
        ax.scatter(
            [knee.bits_per_weight],
            [knee.score],
            marker="*",
            s=180,
            color="tab:red",
            label=f"knee, {knee.bits_per_weight:.2f} bits",
            zorder=4,
        )
    ax.set_xlabel("bits per weight, tables included")
    ax.set_ylabel(sweep.score)
    ax.grid(alpha=0.3)
    ax.legend()
    return ax
