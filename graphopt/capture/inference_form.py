"""The form that captured graphs have: functional ops, norms and dropouts in evaluation."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx
from torch.export import ExportedProgram

from graphopt.ir import op_info
from graphopt.ir.annotations import annotate_dropout, annotate_noise

__all__ = ["dropout_kept", "is_plain", "to_inference_form"]

_dropout = torch.ops.graphopt.dropout.default
_clone = torch.ops.aten.clone.default
# what a write into a part of a value becomes; torch cannot derive it
_copy = torch.ops.aten.copy.default
_converted = torch.ops.aten._to_copy.default
_nowhere = torch.ops.aten.zeros_like.default
_where = torch.ops.aten.where.self
# arithmetic on extents, which decomposition keeps as it is
_PYTHON = (operator.getitem, operator.add, operator.mul, operator.floordiv)


def is_plain(graph: fx.Graph) -> bool:
    """Whether a graph has its form already, so that tracing it again would change nothing."""
    return all(
        _is_kept_whole(node) and not op_info.is_training(node)
        for node in graph.nodes
        if node.op not in ("placeholder", "output")
    )


def _is_kept_whole(node: fx.Node) -> bool:
    info = op_info.info_of(node)
    return node.target in _PYTHON or (info is not None and info.kept_whole)


def _is_dropout(node: fx.Node) -> bool:
    info = op_info.info_of(node)
    return info is not None and info.dropout and not op_info.is_training(node)


@contextmanager
def dropout_kept(exported: ExportedProgram) -> Iterator[None]:
    """Let dropouts and noise pass decomposition, which would turn them into copies without a rate."""
    before = [(node, node.target, node.args, node.kwargs) for node in exported.graph.nodes]
    for node in exported.graph.nodes:
        if _is_dropout(node):
            _not_in_place(node)
            kind = op_info.info_of(node).names[0]  # type: ignore[union-attr]
            node.target, node.args = _dropout, (*node.args[:2], kind)
        elif _is_noise(node):
            _not_in_place(node)
            node.target = op_info.RRELU
    try:
        yield
    finally:
        for node, target, args, kwargs in before:
            node.target, node.args, node.kwargs = target, args, kwargs


def _is_noise(node: fx.Node) -> bool:
    info = op_info.info_of(node)
    return info is not None and info.noise and not op_info.is_training(node)


def _not_in_place(node: fx.Node) -> None:
    """Let what is behind an op that writes into its operand read the op instead."""
    schema = getattr(node.target, "_schema", None)
    operand = node.args[0]
    if schema is None or not schema.is_mutable or not isinstance(operand, fx.Node):
        return
    behind = False
    for other in list(node.graph.nodes):
        if behind and operand in other.all_input_nodes:
            other.replace_input_with(operand, node)
        behind |= other is node


def to_inference_form(graph: fx.Graph) -> None:
    """Dropouts as copies whose metadata keeps the rate, and batch norms in their inference op.

    Copies onto other values (`y[:, 0] = x`) are made of what is copied alone, as ops that can be derived.
    """
    for node in list(graph.nodes):
        info = op_info.info_of(node)
        if node.target is _copy:
            _copy_source(graph, node)
        elif _is_dropout(node):
            _not_in_place(node)
            assert info is not None
            rate = float(node.args[1])
            kind = str(node.args[2]) if node.target is _dropout else info.names[0]
            node.target, node.args = _clone, node.args[:1]
            annotate_dropout(node, rate, kind)
        elif _is_noise(node):
            _not_in_place(node)
            low, high = op_info.noise_range(node)
            node.target, node.args = op_info.LEAKY_RELU, (node.args[0], (low + high) / 2)
            node.kwargs = {}
            annotate_noise(node, low, high)
        elif (
            info is not None
            and info.batch_norm is not None
            and info.batch_norm.training is not None
            and not op_info.is_training(node)
        ):
            _native_norm(graph, node)


def _copy_source(graph: fx.Graph, node: fx.Node) -> None:
    onto, source = node.args[:2]
    assert isinstance(onto, fx.Node)
    assert isinstance(source, fx.Node)
    wanted, given = onto.meta["val"], source.meta["val"]
    if wanted.dtype is given.dtype and wanted.shape == given.shape:
        node.target, node.args, node.kwargs = _clone, (source,), {}
        return
    with graph.inserting_before(node):
        if wanted.dtype is not given.dtype:
            source = graph.call_function(_converted, (source,), {"dtype": wanted.dtype})
            source.meta.update(node.meta, val=given.to(wanted.dtype))
        never = graph.call_function(_nowhere, (onto,), {"dtype": torch.bool})
        never.meta.update(node.meta, val=wanted.to(torch.bool))
    node.target, node.args, node.kwargs = _where, (never, onto, source), {}


def _native_norm(graph: fx.Graph, node: fx.Node) -> None:
    settings = (op_info.momentum_of(node), op_info.eps_of(node))
    with graph.inserting_before(node):
        norm = graph.call_function(op_info.BATCH_NORM, (*node.args[:5], *settings))
        item = graph.call_function(operator.getitem, (norm, 0))
    value = node.meta.get("val")
    norm.meta.update(node.meta)
    item.meta.update(node.meta)
    if value is not None:
        norm.meta["val"] = (value, value.new_empty(0), value.new_empty(0))
    node.replace_all_uses_with(item)
    graph.erase_node(node)
