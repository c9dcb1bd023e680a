"""Graphs as pages and for Model Explorer: what is in them, and that they load nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.browser import evaluated, needs_browser
from helpers.reported_nets import Net, X
from torch import Tensor, nn

from graphopt.backends.lowering import as_program
from graphopt.errors import InputError
from graphopt.inspection import save_graph
from graphopt.ir.program import Program
from graphopt.palettization import KMeansPalettizer
from graphopt.report.graph_layout import rows_of
from graphopt.report.graph_page import graph_page
from graphopt.report.graph_view import GraphView, ViewNode, view_of


@pytest.fixture(scope="module")
def exact(net: nn.Module) -> Program:
    return as_program(net, (X,))


@pytest.fixture(scope="module")
def palettized(exact: Program) -> Program:
    palettizer = KMeansPalettizer(exact)
    palettizer.prepare((X,))
    return palettizer.program()


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r"<script type='application/json' id='data'>(.*?)</script>", page.read_text())
    assert found is not None
    return json.loads(found[1])


def test_weights_are_inside_the_ops_that_read_them(palettized: Program) -> None:
    view = view_of(palettized)
    assert [node.label for node in view.nodes] == [
        "x",
        *(["linear", "relu", "add"] * 2),
        "linear",
        "output",
    ]
    linear = view.nodes[1]
    weight, bias = linear.weights
    row = palettized.table["first.linear.weight"]
    assert (weight.name, weight.shape, weight.stored) == (row.name, "16×16", "4-bit table")
    assert (weight.bits, weight.snr_db) == (row.bits_per_weight, row.snr_db)
    assert (bias.name, bias.bits, bias.snr_db) == ("first.linear.bias", 32, None)


def test_open_dimensions_have_names_and_others_are_numbers(exact: Program) -> None:
    view = view_of(exact)
    assert [node.shape for node in view.nodes if node.label == "linear"] == ["N×16", "N×16", "N×4"]
    assert view.dims == ("N = x[0], 8 in the example",)


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool1d(x, 2)


def test_sizes_that_follow_are_those_of_the_example() -> None:
    view = view_of(as_program(Halves(), (torch.randn(2, 3, 10),)))
    (last,) = [node for node in view.nodes if node.kind == "op"][-1:]
    assert last.shape == "N×L×5"
    assert last.facts == ("float32, 5 = (H//2)",)


def test_modules_are_groups_by_the_way_that_leads_to_them(exact: Program) -> None:
    view = view_of(exact)
    assert [(name, kind, parent) for name, kind, parent in view.groups[1:3]] == [
        ("first", "Block", 0),
        ("first.linear", "Linear", 1),
    ]
    assert [view.groups[node.group][0] for node in view.nodes[:3]] == ["", "first.linear", "first"]


def graph(edges: list[tuple[int, int]], groups: list[int], parents: list[int]) -> GraphView:
    nodes = tuple(
        ViewNode(f"n{place}", "op", "op", group, "") for place, group in enumerate(groups)
    )
    return GraphView("", nodes, tuple(edges), tuple((f"g{p}", "", p) for p in parents))


def test_rows_go_from_givers_to_readers_with_lines_for_long_edges() -> None:
    # 0 → 1 → 2 → 3 and a line from 0 to 3
    rows = rows_of(graph([(0, 1), (1, 2), (2, 3), (0, 3)], [0] * 4, [-1]))[0]
    assert [sorted(row) for row in rows] == [[0], [-1, 1], [-1, 2], [3]]


def test_a_module_is_one_entry_of_the_module_around_it() -> None:
    # 0 → (1 → 2) → 3, the inner two in module 1, entry 4 + 1
    rows = rows_of(graph([(0, 1), (1, 2), (2, 3)], [0, 1, 1, 0], [-1, 0]))
    assert rows == {0: [[0], [5], [3]], 1: [[1], [2]]}


def test_a_module_that_is_called_again_does_not_close_a_circle() -> None:
    # 0 in module 1, 1 outside, 2 in module 1 again
    rows = rows_of(graph([(0, 1), (1, 2), (2, 3)], [1, 0, 1, 0], [-1, 0]))
    assert rows[0] == [[5], [1, 3]]


def test_five_thousand_nodes_get_rows_in_seconds() -> None:
    count = 5000
    edges = [(n, n + 1) for n in range(count - 1)] + [(n, n + 7) for n in range(0, count - 7, 7)]
    rows = rows_of(graph(edges, [0] * count, [-1]))[0]
    assert [entry for row in rows for entry in row if entry >= 0] == list(range(count))


def test_page_has_the_graph_and_forbids_loading(palettized: Program, tmp_path: Path) -> None:
    page = save_graph(palettized, tmp_path / "graph.html")
    text, data = page.read_text(), data_of(page)["graph"]
    assert "default-src 'none'" in text
    assert not re.search(r"<(link|img|iframe|script[^>]+src)", text)
    assert [node["id"] for node in data["nodes"]] == [node.id for node in view_of(palettized).nodes]
    assert len(text) < 60_000


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    program = as_program(Net().eval(), (X,))
    name = "</script><script>alert(1)</script>"
    program = replace(program, provenance=replace(program.provenance, source=name))
    page = save_graph(program, tmp_path / "graph.html")
    assert "<script>alert" not in page.read_text()
    assert data_of(page)["graph"]["title"] == name


def test_two_graphs_are_side_by_side(exact: Program, palettized: Program, tmp_path: Path) -> None:
    page = save_graph(palettized, tmp_path / "pair.html", before=exact)
    before, after = data_of(page)["pair"]
    assert [w["bits"] for w in before["nodes"][1]["weights"]] == [32, 32]
    assert after["nodes"][1]["weights"][0]["bits"] == pytest.approx(6)
    with pytest.raises(InputError, match=r"\.html page"):
        save_graph(palettized, tmp_path / "pair.svg", before=exact)


def test_model_explorer_gets_namespaces_edges_and_figures(
    palettized: Program, tmp_path: Path
) -> None:
    path = save_graph(palettized, tmp_path / "net.explorer.json")
    (collection,) = json.loads(path.read_text())
    (found,) = collection["graphs"]
    nodes = {node["id"]: node for node in found["nodes"]}
    assert nodes["linear"]["namespace"] == "first/linear"
    edges = {
        (edge["sourceNodeId"], node["id"])
        for node in nodes.values()
        for edge in node["incomingEdges"]
    }
    view = view_of(palettized)
    assert edges == {(view.nodes[a].id, view.nodes[b].id) for a, b in view.edges}
    facts = {fact["key"]: fact["value"] for fact in nodes["linear"]["attrs"]}
    assert "4-bit table" in facts["first.linear.weight"]
    assert found["groupNodeAttributes"]["first/linear"] == {"type": "Linear"}


@pytest.mark.slow
@needs_browser
def test_graph_folds_and_finds_in_a_browser(palettized: Program, tmp_path: Path) -> None:
    page = save_graph(palettized, tmp_path / "graph.html")
    expression = (
        "(() => { const v = viewers[0], first = v.state(); v.foldAll(true); const folded = v.state();"
        " const field = document.querySelector('input'); field.value = 'head.weight';"
        " field.dispatchEvent(new Event('input')); return [first, folded, v.state()]; })()"
    )
    (first, folded, found), errors = evaluated(page, tmp_path, expression)
    assert errors == []
    assert first["boxes"] == 9 + 5  # values, and modules that are open
    assert folded["boxes"] == 5  # x, three modules, output
    assert (found["hits"], found["chosen"]) == (1, 7)


@pytest.mark.slow
@needs_browser
def test_five_thousand_boxes_are_drawn_in_a_browser(tmp_path: Path) -> None:
    count, per = 5000, 10
    parents = [-1, *[0] * (count // per)]
    edges = [(n, n + 1) for n in range(count - 1)] + [(n, n + 7) for n in range(0, count - 7, 7)]
    view = graph(edges, [1 + n // per for n in range(count)], parents)
    page = tmp_path / "large.html"
    page.write_text(graph_page(view))
    expression = (
        "(() => { const v = viewers[0], t0 = performance.now(); v.foldAll(false);"
        " const t1 = performance.now(); v.wholeGraph(); v.paint(); const t2 = performance.now();"
        " return [v.state().boxes, t1 - t0, t2 - t1]; })()"
    )
    (boxes, layout, paint), errors = evaluated(page, tmp_path, expression)
    assert errors == []
    assert boxes == count + count // per
    assert layout < 5000
    assert paint < 2000
