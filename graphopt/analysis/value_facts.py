"""Facts about the values of a graph that decide whether and how they are quantized."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

from graphopt.analysis.op_patterns import ACTIVATIONS, NON_NEGATIVE, PATTERNS, Kind
from graphopt.config.selection import ModuleFrame
from graphopt.ir.captured_module import holder_of
from graphopt.ir.editor import operands
from graphopt.numerics.affine import grid_of
from graphopt.specs import QuantizationScheme, QuantizationSpec

__all__ = [
    "attention_scores",
    "bounded_below",
    "data_values",
    "entering_values",
    "inside_norm",
    "is_float",
    "is_pooling",
    "leaving_values",
    "norm_behind",
    "only_user",
    "with_known_range",
]

_aten = torch.ops.aten
_NORM = _aten._native_batch_norm_legit_no_training.default
_SOFTMAX = {_aten.softmax.int, _aten._softmax.default}
_SCORES = {
    *(_aten.add.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.sub.Tensor, _aten.add.Scalar),
    *(_aten.mul.Scalar, _aten.div.Scalar, _aten.masked_fill.Scalar, _aten.where.self),
    *(_aten.clone.default, _aten.view.default, _aten.expand.default, _aten.slice.Tensor),
    *(_aten.maximum.default, _aten.unsqueeze.default, _aten._to_copy.default),
}
_PRODUCTS = {_aten.matmul.default, _aten.bmm.default, _aten.mm.default, _aten.baddbmm.default}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_float(node: fx.Node) -> bool:
    """Whether a node gives one tensor of floats."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in _FLOATS


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that alone reads a node, if there is just one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def norm_behind(node: fx.Node) -> fx.Node | None:
    """The item of a batch norm that alone reads a node."""
    norm = only_user(node)
    if norm is None or norm.target is not _NORM or norm.args[0] is not node:
        return None
    item = only_user(norm)
    if item is None or item.target is not operator.getitem or item.args[1] != 0:
        return None
    return item


def data_values(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes that depend on a float input or on a parameter: not masks, positions or angles."""
    found: set[fx.Node] = set()
    parameters: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder" and is_float(node):
            found.add(node)
        elif node.op == "get_attr":
            holder, name = holder_of(gm, str(node.target))
            if isinstance(getattr(holder, name), nn.Parameter):
                parameters.add(node)
        elif node.op in ("call_function", "call_module"):
            reads = node.all_input_nodes
            if str(node.target).startswith(("graphopt.", "quantized_decomposed.dequantize_per_ch")):
                if all(each.op == "get_attr" or each in parameters for each in reads):
                    parameters.add(node)
                continue_data = any(each in found for each in reads)
                if continue_data:
                    found.add(node)
            elif reads and all(each in parameters for each in reads):
                parameters.add(node)
            elif any(each in found or each in parameters for each in reads):
                found.add(node)
    return found


def attention_scores(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes from a matmul to the softmax that reads its result."""
    found: set[fx.Node] = set()
    for softmax in gm.graph.nodes:
        if softmax.target not in _SOFTMAX:
            continue
        chain: set[fx.Node] = set()
        front = [softmax.args[0]]
        reached = False
        while front:
            node = front.pop()
            if not isinstance(node, fx.Node) or node in chain:
                continue
            if node.target in _PRODUCTS:
                chain.add(node)
                reached = True
            elif node.target in _SCORES:
                chain.add(node)
                front += node.all_input_nodes
        if reached:
            found |= chain
    return found


def is_pooling(mean: fx.Node) -> bool:
    """Whether a mean runs over more than, or other than, the last axis."""
    value = mean.args[0].meta.get("val") if isinstance(mean.args[0], fx.Node) else None
    dims = mean.args[1] if len(mean.args) > 1 else None
    if not isinstance(value, Tensor) or not isinstance(dims, list | tuple):
        return False
    return {int(dim) % value.ndim for dim in dims if isinstance(dim, int)} != {value.ndim - 1}


def inside_norm(frames: tuple[ModuleFrame, ...]) -> bool:
    """Whether the innermost module is a normalisation by its name."""
    return bool(frames) and "norm" in frames[-1].type.rpartition(".")[2].lower()


def bounded_below(node: fx.Node) -> bool:
    """Whether an op's values cannot go far below zero."""
    if node.target in NON_NEGATIVE:
        return True
    known = ACTIVATIONS.get(node.target)
    if known is not None:
        if known.low is not None:
            return True
        place = known.bounds_from
        if place is not None and len(node.args) > place:
            bound = node.args[place]
            return isinstance(bound, int | float) and bound >= 0
        return False
    pattern = PATTERNS.get(node.target)
    source = node.args[0] if node.args else None
    if pattern is not None and pattern.kind is Kind.PASS and isinstance(source, fx.Node):
        return bounded_below(source)
    if pattern is not None and pattern.names[0] in ("avg_pool", "adaptive_avg_pool", "mean"):
        return isinstance(source, fx.Node) and bounded_below(source)
    if pattern is not None and pattern.kind is Kind.SHARE:
        return all(bounded_below(each) for each in node.all_input_nodes)
    return False


def entering_values(
    inside: list[fx.Node], data: set[fx.Node]
) -> dict[fx.Node, list[tuple[fx.Node, int]]]:
    """Data that some nodes read from outside: value → (reader, operand position), by first use."""
    members = set(inside)
    found: dict[fx.Node, list[tuple[fx.Node, int]]] = {}
    for node in inside:
        for position, operand in enumerate(operands(node)):
            if operand not in members and operand in data and is_float(operand):
                found.setdefault(operand, []).append((node, position))
    return found


def leaving_values(inside: list[fx.Node], data: set[fx.Node]) -> list[fx.Node]:
    """Data of some nodes that others read, in order."""
    members = set(inside)
    return [
        node
        for node in inside
        if node in data and is_float(node) and any(user not in members for user in node.users)
    ]


def with_known_range(spec: QuantizationSpec, nodes: list[fx.Node]) -> QuantizationSpec:
    """The affine scheme where all values are bounded below, so that half a grid is not wasted."""
    if grid_of(spec).is_float or spec.qscheme is QuantizationScheme.ASYMMETRIC:
        return spec
    if not nodes or not all(bounded_below(node) for node in nodes):
        return spec
    return spec.model_copy(update={"qscheme": QuantizationScheme.ASYMMETRIC})
