"""One self-contained HTML page about a compressed program; it opens without network."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import yaml
from torch import nn
from torch.export import ExportedProgram
from typing_extensions import Unpack

from graphopt.errors import ArtifactExistsError
from graphopt.extras import require
from graphopt.ir.program import Program
from graphopt.report.charts import CurveChart, DotChart
from graphopt.report.contents import contents_of
from graphopt.report.difference import diff
from graphopt.report.figures import save_figure
from graphopt.report.html_page import page_text, write_text
from graphopt.specs.options import Options

__all__ = ["PageKeywords", "PageOptions", "write_page"]


@dataclass(frozen=True, kw_only=True)
class PageOptions(Options):
    """What a page shows besides the program.

    Attributes:
        sensitivities: A table of `graphopt.mixed_precision.analyze`, or anything whose `plot()`
            returns matplotlib axes.
        curve: A sweep of `graphopt.mixed_precision`, likewise.
        config: The config, as a mapping, an object of ours or text.
        recipe: A recipe of a search, likewise; one of ours shows the error that it predicts, too.
        artifact: What a target made of the program, once it is saved: its size and what was verified.
        title: Heading; the model's name by default.
        overwrite: Replace a file.
    """

    sensitivities: Any = None
    curve: Any = None
    config: Any = None
    recipe: Any = None
    artifact: Any = None
    title: str | None = None
    overwrite: bool = False


class PageKeywords(TypedDict, total=False):
    """The options of `PageOptions` as keywords of a call."""

    sensitivities: Any
    curve: Any
    config: Any
    recipe: Any
    artifact: Any
    title: str | None
    overwrite: bool


def write_page(
    program: Program,
    path: str | Path,
    *,
    before: nn.Module | ExportedProgram | Program | None = None,
    data: Iterable[Any] | None = None,
    **options: Unpack[PageKeywords],
) -> Path:
    """Write sizes, errors per layer, weights with their palettes, activations, curves and the graph.

    Everything is in the file, scripts included, and nothing is fetched. Tables sort and filter, a row of
    a weight shows its histogram, charts zoom, and the graph folds.

    Args:
        program: The compressed program.
        path: An .html file.
        before: The model, for sizes and errors of each layer.
        data: Inputs of one call each, for errors of outputs; needs `before`.
        options: The fields of `PageOptions`: `sensitivities` (a table of
            `graphopt.mixed_precision.analyze`), `curve` (a sweep), `config`, `recipe`, `artifact` (what
            a target made of it, saved), `title` (heading; the model's name by default) and `overwrite`
            (replace a file).

    Raises:
        ArtifactExistsError: The file exists and `overwrite` is False.
        InputError: `before` is another model, or data do not fit.
        MissingDependencyError: Something is drawn by its `plot()` and matplotlib is not installed.

    Examples:
        >>> write_page(compressed, "report.html", before=program, data=batches).name
        'report.html'
    """
    shown = PageOptions.of("write_page", options)
    if Path(path).exists() and not shown.overwrite:
        raise ArtifactExistsError(f"{path} exists; pass overwrite=True to replace it")
    difference = None if before is None else diff(before, program, data)
    foresees = getattr(shown.recipe, "predictions", dict)
    contents = contents_of(program, difference, before, shown.artifact, foresees())
    heading = shown.title or f"{program.provenance.source}, compressed"
    charts: list[dict[str, Any]] = []
    pictures: list[tuple[str, str]] = []
    for name, source in (("Sensitivities", shown.sensitivities), ("Curve", shown.curve)):
        if source is None:
            continue
        chart = source.chart() if hasattr(source, "chart") else None
        if isinstance(chart, DotChart | CurveChart):
            charts.append({**asdict(chart), "section": name})
        else:
            pictures.append((name, _figure(source.plot().get_figure(root=True), len(pictures))))
    values = {
        **contents.to_dict(),
        "charts": charts,
        "texts": [
            (name, _text(value))
            for name, value in (("Config", shown.config), ("Recipe", shown.recipe))
            if value is not None
        ],
        "about": f"captured with torch {program.provenance.torch_version}",
    }
    body = "<main id='page'></main>" + "".join(
        f"<section><h2>{html.escape(name)}</h2>{picture}</section>" for name, picture in pictures
    )
    scripts = ("plotly-basic.min.js", "graph.js", "report_table.js", "report.js")
    return write_text(path, page_text(heading, values, scripts, body), overwrite=shown.overwrite)


def _text(value: Any) -> str:
    """A config or recipe as people write it."""
    if isinstance(value, str):
        return value
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    elif hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")  # types and schemes by their names
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None))


def _figure(figure: Any, number: int) -> str:
    """A figure as inline SVG, with its number on the page."""
    matplotlib = require("matplotlib", "plot")
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        save_figure(figure, stream, "svg")
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # matplotlib numbers the parts of each figure anew; ids must differ within a page
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>f{number}-", text)
    return f"<div class='picture'>{text}</div>"
