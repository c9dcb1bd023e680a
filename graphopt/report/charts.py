"""Charts as values: what is drawn, apart from what draws it (a page, matplotlib)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CurveChart", "DotChart"]


@dataclass(frozen=True, kw_only=True)
class DotChart:
    """Values of layers, one row per layer in the order of the network.

    Attributes:
        title: Heading.
        axis: What the values are, with their unit.
        names: Layers.
        series: (name, one value per layer or None where there is none).
        log: Whether the axis is logarithmic.
    """

    title: str
    axis: str
    names: tuple[str, ...]
    series: tuple[tuple[str, tuple[float | None, ...]], ...]
    log: bool = False
    kind: str = "dots"


@dataclass(frozen=True, kw_only=True)
class CurveChart:
    """Curves over sizes.

    Attributes:
        title: Heading.
        x: What the horizontal axis shows.
        y: What the vertical one shows, with its unit.
        lines: (name, (x, y, label) of its points), joined.
        marks: The same, not joined.
        level: (name, y) of a line across, or None.
    """

    title: str
    x: str
    y: str
    lines: tuple[tuple[str, tuple[tuple[float, float, str], ...]], ...]
    marks: tuple[tuple[str, tuple[tuple[float, float, str], ...]], ...] = ()
    level: tuple[str, float] | None = None
    kind: str = "curve"
