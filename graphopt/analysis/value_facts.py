"""Facts about the values of a graph that decide whether and how they are quantized."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

from graphopt.config.selection import ModuleFrame
from graphopt.ir import op_info
from graphopt.ir.captured_module import holder_of
from graphopt.ir.editor import operands
from graphopt.ir.module_frames import module_frames
from graphopt.ir.op_info import OpInfo, Scales
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
    "norm_reading",
    "only_user",
    "read_by_norms",
    "with_known_range",
]

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
    if norm is None or not op_info.is_batch_norm(norm) or norm.args[0] is not node:
        return None
    item = only_user(norm)
    if item is None or item.target is not operator.getitem or item.args[1] != 0:
        return None
    return item


def data_values(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes that depend on a float input or on a parameter: not masks, positions or angles."""
    values: set[fx.Node] = set()
    parameters: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder" and is_float(node):
            values.add(node)
        elif node.op == "get_attr":
            holder, name = holder_of(gm, str(node.target))
            if isinstance(getattr(holder, name), nn.Parameter):
                parameters.add(node)
        elif node.op in ("call_function", "call_module"):
            reads = node.all_input_nodes
            if str(node.target).startswith(("graphopt.", "quantized_decomposed.dequantize_per_ch")):
                if all(operand.op == "get_attr" or operand in parameters for operand in reads):
                    parameters.add(node)
                continue_data = any(operand in values for operand in reads)
                if continue_data:
                    values.add(node)
            elif reads and all(operand in parameters for operand in reads):
                parameters.add(node)
            elif any(operand in values or operand in parameters for operand in reads):
                values.add(node)
    return values


def attention_scores(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes from a matmul to the softmax that reads its result."""
    scores: set[fx.Node] = set()
    for softmax in gm.graph.nodes:
        if _part(softmax) != "softmax":
            continue
        chain: set[fx.Node] = set()
        front = [softmax.args[0]]
        reached = False
        while front:
            node = front.pop()
            if not isinstance(node, fx.Node) or node in chain:
                continue
            if _part(node) == "product":
                chain.add(node)
                reached = True
            elif _part(node) == "between":
                chain.add(node)
                front += node.all_input_nodes
        if reached:
            scores |= chain
    return scores


def _part(node: fx.Node) -> str | None:
    info = op_info.info_of(node)
    return None if info is None else info.attention


def is_pooling(mean: fx.Node) -> bool:
    """Whether a mean runs over more than, or other than, the last axis."""
    value = mean.args[0].meta.get("val") if isinstance(mean.args[0], fx.Node) else None
    info = op_info.info_of(mean)
    dims = None if info is None else op_info.argument(mean, info.pools_over)
    if not isinstance(value, Tensor) or not isinstance(dims, list | tuple):
        return False
    return {int(dim) % value.ndim for dim in dims if isinstance(dim, int)} != {value.ndim - 1}


def inside_norm(frames: tuple[ModuleFrame, ...]) -> bool:
    """Whether the innermost module is a normalisation by its name."""
    return bool(frames) and "norm" in frames[-1].type.rpartition(".")[2].lower()


def read_by_norms(gm: fx.GraphModule, data: set[fx.Node]) -> dict[fx.Node, str]:
    """Values whose readers all end in a norm that is computed in float.

    Between the value and the norm may stand what computes nothing in integers: sums, averages,
    views, joins, dropouts, casts, and products with a constant. A batch norm is no such norm: with
    its stored statistics it is a scale and a shift, which the convolution before it takes up.

    Args:
        gm: The graph.
        data: From `data_values`.

    Returns:
        Value → name of the norm's op, or of the type of its module.
    """
    ends: dict[fx.Node, str] = {}
    for node in reversed(gm.graph.nodes):
        readers = [user for user in node.users if not _asks(user)]
        found = [_norm_over(node, user, ends, data) for user in readers]
        if found and all(found):
            ends[node] = found[0]
    return ends


def _asks(node: fx.Node) -> bool:
    info = op_info.info_of(node)
    return info is not None and (info.shape_query or info.check is not None)


def _norm_over(node: fx.Node, user: fx.Node, ends: dict[fx.Node, str], data: set[fx.Node]) -> str:
    """The norm in which a reader of a value ends, or ""."""
    if user.target is operator.getitem:
        return ends.get(user, "")
    info = op_info.info_of(user)
    if info is None:
        return ""
    found = norm_reading(node, user, info)
    if found or (info.norm is not None and info.batch_norm is None):
        return found
    return ends.get(user, "") if _hands_on(user, info, data) else ""


def norm_reading(node: fx.Node, user: fx.Node, info: OpInfo) -> str:
    """The norm that a reader of a value is, or a part of; "" where it is none."""
    if info.norm is not None and info.batch_norm is None:
        return info.names[0] if user.args[0] is node else ""
    frames = module_frames(user)
    kind = frames[-1].type.rpartition(".")[2] if frames else ""
    if inside_norm(frames) and "batch" not in kind.lower() and (info.arithmetic or info.cast):
        return kind
    return ""


def _hands_on(node: fx.Node, info: OpInfo, data: set[fx.Node]) -> bool:
    """Whether an op's values are sums, averages, places or multiples of what it reads."""
    if info.sums or info.averages or info.view is not None or info.cast or info.dropout:
        return True
    if info.scales is Scales.PASS:
        return info.activation is None
    if info.both_data:
        return info.arithmetic and sum(operand in data for operand in operands(node)) == 1
    return info.scales is Scales.SHARE


def bounded_below(node: fx.Node) -> bool:
    """Whether an op's values cannot go far below zero."""
    info = op_info.info_of(node)
    if info is None:
        return False
    if info.non_negative:
        return True
    if info.activation is not None:
        if info.activation.low is not None:
            return True
        bound = op_info.argument(node, info.activation.bounds_from)
        return isinstance(bound, int | float) and bound >= 0
    source = node.args[0] if node.args else None
    if info.scales is Scales.PASS or info.averages:
        return isinstance(source, fx.Node) and bounded_below(source)
    if info.scales is Scales.SHARE:
        return all(bounded_below(operand) for operand in node.all_input_nodes)
    return False


def entering_values(
    inside: list[fx.Node], data: set[fx.Node]
) -> dict[fx.Node, list[tuple[fx.Node, int]]]:
    """Data that some nodes read from outside: value → (reader, operand position), by first use."""
    members = set(inside)
    readers: dict[fx.Node, list[tuple[fx.Node, int]]] = {}
    for node in inside:
        for position, operand in enumerate(operands(node)):
            if operand not in members and operand in data and is_float(operand):
                readers.setdefault(operand, []).append((node, position))
    return readers


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
