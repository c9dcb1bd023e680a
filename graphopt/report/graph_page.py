"""A program's graph as a page to walk through, and two of them side by side."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from graphopt.report.graph_layout import rows_of
from graphopt.report.graph_view import GraphView
from graphopt.report.html_page import page_text

__all__ = ["graph_data", "graph_page", "pair_page"]


def graph_data(view: GraphView) -> dict[str, Any]:
    """What the viewer reads: boxes, lines, modules and the rows of each."""
    rows = rows_of(view)
    return {**asdict(view), "rows": [rows.get(group, []) for group in range(len(view.groups))]}


def graph_page(view: GraphView) -> str:
    """The page of one graph."""
    body = "<div id='graph'></div>"
    return page_text(view.title, {"graph": graph_data(view)}, ("graph.js", "graph_page.js"), body)


def pair_page(before: GraphView, after: GraphView) -> str:
    """The page of two graphs; what is folded or chosen in one is in the other."""
    pair = [graph_data(before), graph_data(after)]
    body = (
        "<div class='pair'><div><h2>before</h2><div id='before'></div></div>"
        "<div><h2>after</h2><div id='after'></div></div></div>"
    )
    title = f"{before.title}, before and after"
    return page_text(title, {"pair": pair}, ("graph.js", "graph_page.js"), body)
