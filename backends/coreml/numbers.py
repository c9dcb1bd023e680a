"""Whole numbers among floats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.torch_private import OpOverload

__all__ = ["numbers_as_floats"]

_TAKES_FLOATS = ("number", "float", "Tensor")


def numbers_as_floats(graph: fx.Graph) -> None:
    """Give ops of floats their numbers as floats: coremltools takes the type of each as it is written.

    Before: `leaky_relu(x, 2)`, `addmm(x, a, b, beta=2)`; after: `leaky_relu(x, 2.0)`, `addmm(x, a, b, beta=2.0)`.

    Args:
        graph: With values in `meta["val"]`; it is changed.
    """
    for node in graph.nodes:
        if not isinstance(node.target, OpOverload) or not _is_of_floats(node):
            continue
        taken = {argument.name: str(argument.type) for argument in node.target._schema.arguments}
        node.args = tuple(map(_as_float, node.args, taken.values()))
        node.kwargs = {name: _as_float(value, taken[name]) for name, value in node.kwargs.items()}


def _is_of_floats(node: fx.Node) -> bool:
    """Whether an op gives one tensor of floats and is given such, beside masks."""
    values = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
    types = [value.dtype for value in values if isinstance(value, Tensor)]
    if len(values) < 2 or len(types) < len(values):
        return False
    first, *given = types
    return first.is_floating_point and all(t.is_floating_point or t == torch.bool for t in given)


def _as_float(value: Any, kind: str) -> Any:
    takes = kind.removeprefix("Optional[").removesuffix("]") in _TAKES_FLOATS
    return float(value) if takes and type(value) is int else value
