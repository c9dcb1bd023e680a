"""The annotated graph of a program as a picture, or in a format of graph viewers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.errors import InputError
from graphopt.extras import deferred, require
from graphopt.files import replaced
from graphopt.ir.annotations import describe_annotations
from graphopt.ir.graph_text import op_name, value_text
from graphopt.ir.module_frames import module_frames
from graphopt.ir.program import Program
from graphopt.report.explorer import explorer_graphs
from graphopt.report.figures import save_figure
from graphopt.report.graph_page import graph_page, pair_page
from graphopt.report.graph_view import view_of

if TYPE_CHECKING:
    import networkx as nx
else:
    nx = deferred("networkx")

__all__ = ["graph_of", "save_graph"]

_COLOURS = {
    "weight": "#f6c87a",
    "lookup": "#9bd39b",
    "rounding": "#a9c4eb",
    "data": "#dddddd",
    "op": "#ffffff",
}
_EXPLORER = ".explorer.json"
_SUFFIXES = (".html", _EXPLORER, ".svg", ".png", ".graphml", ".gexf", ".json")
_LARGEST = 400  # nodes that a picture shows legibly


def graph_of(gm: fx.GraphModule) -> nx.DiGraph[str]:
    """A graph as networkx has it: node name → op, type, module, annotation and kind."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for node in gm.graph.nodes:
        frames = [frame for frame in module_frames(node) if frame.name]
        what = str(node.target) if node.op in ("get_attr", "placeholder") else op_name(node.target)
        graph.add_node(
            node.name,
            op=what,
            type=value_text(node.meta.get("val")),
            kind=_kind(node),
            module=frames[-1].name if frames else "",
            annotation=describe_annotations(node),
        )
        for operand in node.all_input_nodes:
            graph.add_edge(operand.name, node.name)
    return graph


def save_graph(
    program: Program, path: str | Path, *, weights: bool = True, before: Program | None = None
) -> Path:
    """Write a program's graph with its annotations.

    Args:
        program: Compressed or not.
        path: .html is a page to walk through, with modules that fold and weights inside their ops,
            coloured by bits or error, for thousands of nodes; .explorer.json is for Google's Model
            Explorer. .svg and .png are drawn (up to 400 nodes); .graphml and .gexf are for graph viewers
            (Gephi, yEd, Cytoscape), .json is networkx's node-link form. A viewer of models such as
            Netron opens the .pt2 that `program.save` writes.
        weights: Show constants as nodes, too; pages and Model Explorer have them inside their ops.
        before: For a page: a second program, which is shown beside this one.

    Raises:
        InputError: The suffix is none of these, the graph has too many nodes for a picture, or two
            programs are to be drawn in another form than a page.
        MissingDependencyError: matplotlib is not installed and a picture is asked for.

    Examples:
        >>> save_graph(compressed, "graph.html").name
        'graph.html'
        >>> save_graph(compressed, "graph.explorer.json").name
        'graph.explorer.json'
    """
    target = Path(path)
    suffix = _EXPLORER if target.name.endswith(_EXPLORER) else target.suffix
    if suffix not in _SUFFIXES:
        raise InputError(f"cannot draw {target.name}; use {', '.join(_SUFFIXES)}")
    if before is not None and suffix != ".html":
        raise InputError(f"two graphs are shown in an .html page, not in {target.name}")
    with replaced(target) as temporary:
        if suffix == ".html":
            view = view_of(program)
            page = graph_page(view) if before is None else pair_page(view_of(before), view)
            temporary.write_text(page, encoding="utf-8")
        elif suffix == _EXPLORER:
            temporary.write_text(json.dumps(explorer_graphs(view_of(program)), indent=1))
        else:
            _save_networkx(program.graph_module, temporary, suffix, weights=weights)
    return target


def _save_networkx(gm: fx.GraphModule, path: Path, suffix: str, *, weights: bool) -> None:
    graph = graph_of(gm)
    if not weights:
        graph.remove_nodes_from([n for n, kind in graph.nodes(data="kind") if kind == "weight"])
    if suffix in (".svg", ".png") and len(graph) > _LARGEST:
        raise InputError(
            f"{len(graph)} nodes are too many for a picture (at most {_LARGEST}); use .html, .graphml,"
            " or weights=False"
        )
    if suffix == ".graphml":
        nx.write_graphml(graph, path)
    elif suffix == ".gexf":
        nx.write_gexf(graph, path)
    elif suffix == ".json":
        path.write_text(json.dumps(nx.node_link_data(graph, edges="links"), indent=1))
    else:
        save_figure(_draw(graph), path, suffix[1:])


def _kind(node: fx.Node) -> str:
    target = str(node.target)
    if node.op == "get_attr":
        return "weight"
    if node.op in ("placeholder", "output"):
        return "data"
    if target.startswith(("graphopt.lut", "graphopt.shift", "graphopt.sparse")):
        return "lookup"
    if target.startswith(("quantized_decomposed", "graphopt.round")):
        return "rounding"
    return "op"


def _draw(graph: nx.DiGraph[str]) -> Any:
    """Boxes from top to bottom, a row per distance from the inputs."""
    figure_class = require("matplotlib.figure", "plot").Figure
    patches = require("matplotlib.patches", "plot")
    rows: dict[str, int] = {}
    constant: set[str] = set()
    for name in nx.topological_sort(graph):
        before = list(graph.predecessors(name))
        rows[name] = max((rows[other] for other in before), default=-1) + 1
        own = (
            graph.nodes[name]["kind"] != "data"
            if not before
            else all(x in constant for x in before)
        )
        if own:
            constant.add(name)
    for name in reversed(list(nx.topological_sort(graph))):
        # weights stand right above what reads them
        readers = [rows[other] for other in graph.successors(name)]
        if name in constant and readers:
            rows[name] = min(readers) - 1
    lines: dict[int, list[str]] = {}
    for name, row in rows.items():
        lines.setdefault(row, []).append(name)
    order = {name: place for place, name in enumerate(nx.topological_sort(graph))}
    spots: dict[str, tuple[float, float]] = {}
    for row in sorted(lines):
        # near what they read, to cross few lines
        line = sorted(lines[row], key=lambda name: (_mean(graph, name, spots), order[name]))
        for place, name in enumerate(line):
            spots[name] = (place - (len(line) - 1) / 2, -row)
    widest = max(len(line) for line in lines.values())
    width, height = 2.9 * widest + 0.5, 0.8 * (max(rows.values()) - min(rows.values()) + 1) + 0.5
    figure = figure_class(figsize=(width, height))
    ax = figure.add_axes((0, 0, 1, 1))
    for first, second in graph.edges:
        (x0, y0), (x1, y1) = spots[first], spots[second]
        arrow = {"arrowstyle": "-|>", "color": "#777777", "linewidth": 0.7, "shrinkB": 0}
        ax.annotate("", (x1, y1 + 0.3), (x0, y0 - 0.3), arrowprops=arrow)
    for name, about in graph.nodes(data=True):
        x, y = spots[name]
        box = patches.FancyBboxPatch(
            (x - 0.47, y - 0.3),
            0.94,
            0.6,
            boxstyle="round,pad=0,rounding_size=0.06",
            linewidth=0.6,
            facecolor=_COLOURS[about["kind"]],
            edgecolor="#444444",
            zorder=3,
        )
        ax.add_patch(box)
        parts = [
            name,
            about["op"] if about["op"] != name else "",
            about["type"],
            about["annotation"],
        ]
        text = "\n".join(_short(part) for part in parts if part)
        ax.text(x, y, text, ha="center", va="center", fontsize=6, family="monospace", zorder=4)
    left = min(x for x, _ in spots.values())
    right = max(x for x, _ in spots.values())
    ax.set_xlim(left - 0.6, right + 0.6)
    ax.set_ylim(-max(rows.values()) - 0.6, -min(rows.values()) + 0.6)
    ax.axis("off")
    return figure


def _mean(graph: nx.DiGraph[str], name: str, spots: dict[str, tuple[float, float]]) -> float:
    known = [spots[other][0] for other in graph.predecessors(name) if other in spots]
    return sum(known) / len(known) if known else 0.0


def _short(text: str, limit: int = 44) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
