"""Write the nodes of our domain in ops of the standard."""

from __future__ import annotations

from typing import Any

from graphopt.backends.onnx.emitter import Emitter
from graphopt.backends.onnx.own_nodes import DOMAIN
from graphopt.backends.onnx.rounding import (
    expand_dequantize,
    expand_quantize,
    expand_round,
    is_shiftable,
)
from graphopt.backends.onnx.scales import expand_shift_scale
from graphopt.backends.onnx.tables import expand_lookup, expand_sparse

__all__ = ["expand"]


def expand(model: Any) -> None:
    """Replace every node of our own.

    Args:
        model: Of onnx_ir; it is changed.
    """
    emit = Emitter(model.graph)
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    quantized = [node for node in nodes if node.op_type == "quantize"]
    # uint8 all over, or a product of uint8 and int8 would stand beside those that are shifted
    unsigned = bool(quantized) and all(map(is_shiftable, quantized))
    for node in nodes:
        emit.place = node
        made, done = _expanded(emit, node, unsigned)
        emit.replace(made, done)
        if done is not node:
            model.graph.remove(node, safe=True)
    _drop_unread(model.graph)
    model.opset_imports.pop(DOMAIN, None)


def _expanded(emit: Emitter, node: Any, unsigned: bool) -> tuple[Any, Any]:
    """What a node gives, and the node whose result that is."""
    match node.op_type:
        case "lut_to_dense":
            return expand_lookup(emit, node), node
        case "sparse_to_dense":
            return expand_sparse(emit, node), node
        case "shift_scale":
            return expand_shift_scale(emit, node, unsigned)
        case "quantize":
            return expand_quantize(emit, node, unsigned), node
        case "dequantize":
            return expand_dequantize(emit, node), node
        case "round_to_float":
            return expand_round(emit, node), node
    raise AssertionError(node.op_type)


def _drop_unread(graph: Any) -> None:
    for name, value in list(graph.initializers.items()):
        if not list(value.uses()) and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]
