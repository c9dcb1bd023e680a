"""Write the nodes of our domain in ops of the standard."""

from __future__ import annotations

from typing import Any

from graphopt.backends.onnx.emitter import Emitter
from graphopt.backends.onnx.matmul_nbits import MICROSOFT, as_matmul_nbits
from graphopt.backends.onnx.options import ONNXOptions
from graphopt.backends.onnx.own_nodes import DOMAIN
from graphopt.backends.onnx.quantize_ops import (
    expand_dequantize,
    expand_quantize,
    expand_round,
    is_shiftable,
)
from graphopt.backends.onnx.scales import Reading, expand_shift_scale
from graphopt.backends.onnx.tables import expand_lookup, expand_sparse

__all__ = ["expand"]


def expand(model: Any, options: ONNXOptions) -> None:
    """Replace every node of our own.

    Args:
        model: Of onnx_ir; it is changed.
        options: Of `lower`.
    """
    emit = Emitter(model.graph)
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    quantized = [node for node in nodes if node.op_type == "quantize"]
    # uint8 all over, or a product of uint8 and int8 would stand beside those that are shifted
    unsigned = bool(quantized) and all(map(is_shiftable, quantized))
    shifted = unsigned and options.kernels == "any"
    dequantize = options.weights == "dequantize"
    readings = {
        node: Reading(_meets_integers(node), shifted, dequantize)
        for node in nodes
        if node.op_type == "shift_scale"
    }
    for node in nodes:
        emit.place = node
        if node.op_type == "shift_scale":
            reading = readings[node]
            if options.matmul == "nbits" and not reading.integer and as_matmul_nbits(emit, node):
                model.opset_imports[MICROSOFT] = 1
                _drop_nodes(model.graph, node)
                continue
            made, done = expand_shift_scale(emit, node, reading)
        else:
            made, done = _expanded(emit, node, unsigned), node
        emit.replace(made, done)
        if done is not node:
            model.graph.remove(node, safe=True)
    _drop_unread(model.graph)
    model.opset_imports.pop(DOMAIN, None)


def _expanded(emit: Emitter, node: Any, unsigned: bool) -> Any:
    """What a node gives."""
    match node.op_type:
        case "lut_to_dense":
            return expand_lookup(emit, node)
        case "sparse_to_dense":
            return expand_sparse(emit, node)
        case "quantize":
            return expand_quantize(emit, node, unsigned)
        case "dequantize":
            return expand_dequantize(emit, node)
        case "round_to_float":
            return expand_round(emit, node)
    raise AssertionError(node.op_type)


def _meets_integers(node: Any) -> bool:
    """Whether a weight is read together with rounded activations, through a transposition or not."""
    (result,) = node.outputs
    for use in result.uses():
        reader = use.node
        if reader.op_type == "Transpose" and not reader.domain:
            if _meets_integers(reader):
                return True
            continue
        makers = [value.producer() for value in reader.inputs if value is not None]
        if any(m is not None and (m.domain, m.op_type) == (DOMAIN, "dequantize") for m in makers):
            return True
    return False


def _drop_nodes(graph: Any, node: Any) -> None:
    """Drop a node that nothing reads, and what turned its result."""
    (result,) = node.outputs
    graph.remove([*(use.node for use in result.uses()), node], safe=True)


def _drop_unread(graph: Any) -> None:
    for name, value in list(graph.initializers.items()):
        if not list(value.uses()) and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]
