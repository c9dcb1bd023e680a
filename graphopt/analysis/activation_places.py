"""Where the annotations of a graph ask for activations to be rounded."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from graphopt.ir.annotations import ActivationPoint, input_points, output_point
from graphopt.ir.editor import operands

__all__ = ["places_of"]


def places_of(
    gm: fx.GraphModule,
) -> list[tuple[ActivationPoint, fx.Node, tuple[tuple[fx.Node, int], ...] | None]]:
    """Annotated activations: point, value, and who reads it rounded (None: everybody)."""
    places: list[Any] = []
    for node in gm.graph.nodes:
        point = output_point(node)
        value = node.meta.get("val")
        if point is not None and isinstance(value, Tensor):
            places.append((point, node, None))
    local: dict[tuple[str, fx.Node], tuple[ActivationPoint, list[tuple[fx.Node, int]]]] = {}
    for node in gm.graph.nodes:
        for position, point in input_points(node).items():
            operand = operands(node)[position]
            entry = local.setdefault((point.group, operand), (point, []))
            entry[1].append((node, position))
    places += [(point, operand, tuple(users)) for (_, operand), (point, users) in local.items()]
    return places
