"""A graph in the form of Google's Model Explorer: a collection of graphs in JSON."""

from __future__ import annotations

from typing import Any

from graphopt.report.graph_view import GraphView, ViewNode

__all__ = ["explorer_graphs"]


def explorer_graphs(view: GraphView) -> list[dict[str, Any]]:
    """One collection with one graph; field names are those of `model_explorer.graph_builder`."""
    incoming: dict[int, list[dict[str, str]]] = {}
    for giver, reader in view.edges:
        own = incoming.setdefault(reader, [])
        own.append(
            {
                "sourceNodeId": view.nodes[giver].id,
                "sourceNodeOutputId": "0",
                "targetNodeInputId": str(len(own)),
            }
        )
    nodes = [
        {
            "id": node.id,
            "label": node.label,
            "namespace": _namespace(view, node.group),
            "attrs": [{"key": key, "value": value} for key, value in _facts(node)],
            "incomingEdges": incoming.get(place, []),
            "outputsMetadata": [{"id": "0", "attrs": [{"key": "shape", "value": node.shape}]}]
            if node.shape
            else [],
        }
        for place, node in enumerate(view.nodes)
    ]
    types = {
        _namespace(view, place): {"type": kind}
        for place, (_, kind, _) in enumerate(view.groups)
        if place
    }
    graph = {"id": view.title, "nodes": nodes, "groupNodeAttributes": types}
    return [{"label": view.title, "graphs": [graph]}]


def _namespace(view: GraphView, group: int) -> str:
    parts: list[str] = []
    while group > 0:
        name, _, around = view.groups[group]
        outer = f"{view.groups[around][0]}." if around > 0 else ""
        parts.append(name.removeprefix(outer))
        group = around
    return "/".join(reversed(parts))


def _facts(node: ViewNode) -> list[tuple[str, str]]:
    facts = [("kind", node.kind), *((f"fact {n}", text) for n, text in enumerate(node.facts))]
    for weight in node.weights:
        text = f"{weight.shape or 'scalar'}, {weight.stored}, {weight.bits:.3f} bits per element"
        error = "" if weight.snr_db is None else f", {weight.snr_db:.1f} dB"
        facts.append((weight.name, text + error))
    return facts
