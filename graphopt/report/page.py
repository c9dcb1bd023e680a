"""One self-contained HTML page about a compressed program; it opens without network."""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from typing_extensions import Unpack

from graphopt.analysis.stored_values import find_lookups
from graphopt.errors import ArtifactExistsError
from graphopt.extras import require
from graphopt.files import replaced
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.report.bits import bits_per_weight
from graphopt.report.difference import Difference, decibels, diff
from graphopt.run.interpreter import constant_value
from graphopt.specs.options import Options

__all__ = ["PageKeywords", "PageOptions", "write_page"]

_MOST_HISTOGRAMS = 24
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em;
       color: #1d1d1f; background: #fff; }
h1 { font-size: 1.7em; } h2 { margin-top: 2em; font-size: 1.25em; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { padding: 4px 8px; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, th.l, td.l { text-align: left; }
tr:hover td { background: #f5f5f7; } td { white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content auto; gap: 2px 16px; }
dt { color: #6e6e73; } dd { margin: 0; }
svg { max-width: 100%; height: auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 8px; }
.wide { overflow-x: auto; }
"""


@dataclass(frozen=True, kw_only=True)
class PageOptions(Options):
    """What a page shows besides the program.

    Attributes:
        sensitivities: A table of `graphopt.mixed_precision.analyze`, or anything whose `plot()`
            returns matplotlib axes.
        curve: A sweep of `graphopt.mixed_precision`, likewise.
        title: Heading; the model's name by default.
        overwrite: Replace a file.
    """

    sensitivities: Any = None
    curve: Any = None
    title: str | None = None
    overwrite: bool = False


class PageKeywords(TypedDict, total=False):
    """The options of `PageOptions` as keywords of a call."""

    sensitivities: Any
    curve: Any
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
    """Write sizes, errors per layer, histograms of weights with their palettes, and curves.

    Args:
        program: The compressed program.
        path: An .html file.
        before: The model, for sizes and errors of each layer.
        data: Inputs of one call each, for errors of outputs; needs `before`.
        options: The fields of `PageOptions`: `sensitivities` (a table of
            `graphopt.mixed_precision.analyze`), `curve` (a sweep), `title` (heading; the model's
            name by default) and `overwrite` (replace a file).

    Raises:
        ArtifactExistsError: The file exists and `overwrite` is False.
        InputError: `before` is another model, or data do not fit.
        MissingDependencyError: matplotlib is not installed.
    """
    shown = PageOptions.of("write_page", options)
    target = Path(path)
    if target.exists() and not shown.overwrite:
        raise ArtifactExistsError(f"{target} exists; pass overwrite=True to replace it")
    difference = None if before is None else diff(before, program, data)
    heading = shown.title or f"{program.provenance.source}, compressed"
    parts = [f"<h1>{html.escape(heading)}</h1>", _facts(program, difference)]
    if difference is not None:
        parts += [_section("Sizes", _sizes(difference)), _section("Errors", _errors(difference))]
        parts.append(_section("Layers", _layers(difference)))
    parts.append(_section("Tensors", _tensors(program)))
    palettes = _histograms(program, before)
    if palettes:
        parts.append(_section("Weights and their palettes", palettes))
    for name, source in _curves(shown):
        if source is not None:
            parts.append(_section(name, _figure(source.plot().get_figure(root=True))))
    page = (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{html.escape(heading)}"
        f"</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    with replaced(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def _curves(shown: PageOptions) -> tuple[tuple[str, Any], ...]:
    return ("Sensitivities", shown.sensitivities), ("Accuracy over bits", shown.curve)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def _facts(program: Program, difference: Difference | None) -> str:
    counted = bits_per_weight(program)
    table = program.table
    rows = [
        ("stored", f"{counted.total_bits / 8 / 1024:,.1f} KiB, {counted.bpw:.3f} bits per element"),
        (
            "compressed weights",
            f"{len(table.compressed)} of {len(table)}, {table.bits_per_weight:.3f} bits each",
        ),
    ]
    if difference is not None:
        was = sum(layer.bytes_before for layer in difference)
        now = max(1, sum(layer.bytes_after for layer in difference))
        rows.append(("weights", f"{was / 1024:,.1f} → {now / 1024:,.1f} KiB, {was / now:.2f}×"))
        if difference.output_sqnr:
            shown = ", ".join(decibels(value) for value in difference.output_sqnr)
            rows.append(("signal to error of the outputs", f"{shown} dB"))
    rows += [
        *(("state", str(state)) for state in program.state),
        ("torch", program.provenance.torch_version),
        *(("note", warning) for warning in table.warnings),
    ]
    items = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in rows)
    return f"<dl>{items}</dl>"


def _new(width: float, height: float) -> tuple[Any, Any]:
    # no pyplot: a figure of its own changes no global state
    figure = require("matplotlib.figure", "plot").Figure(
        figsize=(width, height), layout="constrained"
    )
    return figure, figure.add_subplot()


def _figure(figure: Any) -> str:
    """A figure as inline SVG; a fixed salt makes equal pages equal."""
    matplotlib = require("matplotlib", "plot")
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "graphopt", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # matplotlib numbers the parts of each figure anew; ids must differ within a page
    own = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>f{own}-", text)
    return f"<div class='wide'>{text}</div>"


def _sizes(difference: Difference) -> str:
    figure, ax = _new(10, max(2.0, 0.22 * len(difference) + 1))
    places = range(len(difference))
    names = [layer.name for layer in difference]
    ax.barh(places, [x.bytes_before / 1024 for x in difference], color="#d0d0d5", label="before")
    ax.barh(
        places,
        [x.bytes_after / 1024 for x in difference],
        color="#3b7dd8",
        height=0.5,
        label="after",
    )
    ax.set_yticks(list(places), names, fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel("KiB")
    ax.legend()
    return _figure(figure)


def _errors(difference: Difference) -> str:
    figure, ax = _new(10, max(2.5, 0.22 * len(difference) + 1))
    places = list(range(len(difference)))
    series: list[tuple[str, list[float | None]]] = [
        ("weight", [layer.weight_sqnr for layer in difference])
    ]
    if any(layer.output_sqnr is not None for layer in difference):
        series.append(("output, this layer alone", [x.own_sqnr for x in difference]))
        series.append(("output, with the layers before", [x.output_sqnr for x in difference]))
    for name, values in series:
        shown = [math.nan if v is None or not math.isfinite(v) else v for v in values]
        ax.plot(shown, places, marker="o", markersize=3, linewidth=1, label=name)
    ax.set_yticks(places, [layer.name for layer in difference], fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel("signal to error, dB (exact layers have no point)")
    ax.grid(axis="x", color="#e5e5e5")
    ax.legend()
    return _figure(figure)


def _layers(difference: Difference) -> str:
    heads = (
        "weight",
        "op",
        "shape",
        "stored as",
        "bits",
        "tables",
        "KiB before",
        "KiB after",
        "weight dB",
        "own dB",
        "output dB",
    )
    rows = [
        (
            layer.name,
            layer.op_type,
            "×".join(map(str, layer.shape)),
            layer.dtype,
            f"{layer.bits:.2f}",
            str(layer.tables or ""),
            f"{layer.bytes_before / 1024:.1f}",
            f"{layer.bytes_after / 1024:.1f}",
            decibels(layer.weight_sqnr),
            decibels(layer.own_sqnr),
            decibels(layer.output_sqnr),
        )
        for layer in difference
    ]
    return _table(heads, rows)


def _tensors(program: Program) -> str:
    heads = ("tensor", "status", "what, or why not", "bits", "KiB", "weight dB")
    rows = [
        (
            row.name,
            row.status,
            "; ".join(filter(None, (row.detail, row.note))),
            f"{row.bits_per_weight:.3f}",
            f"{row.stored_bits / 8192:.2f}",
            decibels(row.snr_db),
        )
        for row in program.table
    ]
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    left = {
        place
        for place, name in enumerate(heads)
        if name in ("op", "status", "what, or why not", "stored as")
    }

    def line(tag: str, cells: Sequence[str]) -> str:
        shown = (
            f"<{tag}{' class=l' if place in left else ''}>{html.escape(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        )
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<div class='wide'><table><thead>{line('th', heads)}</thead><tbody>{body}</tbody></table></div>"


def _histograms(program: Program, before: Any) -> str:
    """The largest palettized weights: distribution, table entries, and how often each is used."""
    edit = Editor(program.graph_module)
    lookups = sorted(find_lookups(program.graph_module), key=lambda entry: -math.prod(entry.shape))
    originals = _originals(before)
    drawn = []
    for lookup in lookups[:_MOST_HISTOGRAMS]:
        with torch.no_grad():
            dense = constant_value(edit.gm, lookup.dense).detach().float()
            tables = constant_value(edit.gm, lookup.node.args[1]).detach().float()  # type: ignore[arg-type]
        figure, ax = _new(3.0, 2.1)
        exact = originals.get(lookup.name.removesuffix("_values"))
        values = dense if exact is None else exact.float()
        low, high = float(values.min()), float(values.max())
        if low == high:
            low, high = low - 1, high + 1
        counts = torch.histc(values.reshape(-1), 80, low, high)
        step = (high - low) / 80
        edges = [low + step * place for place in range(80)]
        ax.bar(edges, (counts / counts.max()).tolist(), width=step, align="edge", color="#b9cdea")
        entries = tables.reshape(-1, tables.shape[-2], tables.shape[-1])
        if lookup.channel_scale:
            entries = dense.unique().reshape(1, -1, 1)
        ticks = entries.reshape(-1)[:512]
        ax.vlines(ticks.tolist(), 0, 1, color="#d8603b", linewidth=0.5 if len(ticks) > 64 else 0.9)
        many = f", {len(entries)} tables" if len(entries) > 1 else ""
        ax.set_title(f"{lookup.name}\n{lookup.n_bits} bits{many}", fontsize=7)
        ax.tick_params(labelsize=6)
        ax.set_yticks([])
        drawn.append(_figure(figure))
    rest = len(lookups) - len(drawn)
    note = f"<p>{rest} smaller weights are not drawn.</p>" if rest > 0 else ""
    return f"<div class='grid'>{''.join(drawn)}</div>{note}" if drawn else ""


def _originals(before: Any) -> dict[str, Tensor]:
    if before is None:
        return {}
    module = before.graph_module if isinstance(before, Program) else before
    if isinstance(module, ExportedProgram):
        module = module.module()
    return {name: parameter.detach() for name, parameter in module.named_parameters()}
