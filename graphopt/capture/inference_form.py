"""The form that captured graphs have: functional ops, norms and dropouts in evaluation."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

import graphopt.ir.ops  # noqa: F401 - registers the stand-in of dropouts
from graphopt.ir.annotations import annotate_dropout

__all__ = ["dropout_kept", "is_plain", "to_inference_form"]

_aten = torch.ops.aten
_ours = torch.ops.graphopt
_NATIVE_NORM = _aten._native_batch_norm_legit_no_training.default
# ops that decomposition keeps as they are, or that have a form here
_PLAIN = {
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.conv2d.padding),
    *(_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.linear.default),
    *(_aten.relu.default, _aten.relu6.default, _aten.hardtanh.default, _aten.sigmoid.default),
    *(_aten.silu.default, _aten.gelu.default, _aten.tanh.default, _aten.hardswish.default),
    *(_aten.hardsigmoid.default, _aten.leaky_relu.default, _aten.softmax.int),
    *(_aten.max_pool2d.default, _aten.avg_pool2d.default, _aten.adaptive_avg_pool2d.default),
    *(_aten.mean.dim, _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.cat.default),
    *(_aten.pixel_shuffle.default, _aten.layer_norm.default, _aten.embedding.default),
    *(_aten.flatten.using_ints, _aten.batch_norm.default, _aten.dropout.default),
    *(_aten.sym_size.int, operator.getitem, operator.add, operator.mul, operator.floordiv),
}


def is_plain(graph: fx.Graph) -> bool:
    """Whether a graph has its form already, so that tracing it again would change nothing."""
    return all(
        node.target in _PLAIN and not _trains(node)
        for node in graph.nodes
        if node.op not in ("placeholder", "output")
    )


def _trains(node: fx.Node) -> bool:
    if node.target is _aten.dropout.default:
        return bool(node.args[2])
    return node.target is _aten.batch_norm.default and bool(node.args[5])


@contextmanager
def dropout_kept(exported: ExportedProgram) -> Iterator[None]:
    """Let dropouts pass decomposition, which would turn them into copies without a rate."""
    kept: list[tuple[fx.Node, Any, Any]] = []
    for node in exported.graph.nodes:
        if node.target is _aten.dropout.default and not _trains(node):
            kept.append((node, node.target, node.args))
            node.target, node.args = _ours.dropout.default, node.args[:2]
    try:
        yield
    finally:
        for node, target, args in kept:
            node.target, node.args = target, args


def to_inference_form(graph: fx.Graph) -> None:
    """Dropouts as copies whose metadata keeps the rate, and batch norms in their inference op."""
    for node in list(graph.nodes):
        if node.target in (_ours.dropout.default, _aten.dropout.default) and not (
            node.target is _aten.dropout.default and _trains(node)
        ):
            rate = float(node.args[1])
            node.target, node.args = _aten.clone.default, node.args[:1]
            annotate_dropout(node, rate)
        elif node.target is _aten.batch_norm.default and not _trains(node):
            _native_norm(graph, node)


def _native_norm(graph: fx.Graph, node: fx.Node) -> None:
    x, gamma, beta, mean, variance, _, momentum, eps = node.args[:8]
    with graph.inserting_before(node):
        norm = graph.call_function(_NATIVE_NORM, (x, gamma, beta, mean, variance, momentum, eps))
        item = graph.call_function(operator.getitem, (norm, 0))
    value = node.meta.get("val")
    norm.meta.update(node.meta)
    item.meta.update(node.meta)
    if value is not None:
        norm.meta["val"] = (value, value.new_empty(0), value.new_empty(0))
    node.replace_all_uses_with(item)
    graph.erase_node(node)
