"""Decomposition of what a table names, and of nothing else: one call of each kind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.utils import _pytree as pytree

from graphopt.ir.editor import ORIGIN
from graphopt.ir.recording import Body, NotRecordableError, never_whole, recorded
from graphopt.ir.torch_private import OpOverload

__all__ = ["decomposed", "is_functional", "name_outputs", "never_whole"]

_log = logging.getLogger(__name__)
Table = Mapping[Any, Callable[..., Any]]


def decomposed(exported: ExportedProgram, table: Table) -> ExportedProgram:
    """What `exported.run_decompositions(table)` computes, at the cost of the ops that are decomposed.

    That traces a whole program again. Here one call of each kind (op, sizes, types and arguments) of
    those in the table is decomposed by itself, and each call in the graph gives way to what came out of
    its like. Decompositions that write, or make tensors of their own, are left to torch.

    Args:
        exported: A program whose sizes are all numbers; others are traced whole. It may be changed.
        table: Op → what replaces it.
    """
    calls = [node for node in exported.graph.nodes if node.op not in ("placeholder", "output")]
    targets = {call.target for call in calls}
    broken_up = {op for op in targets if op in table or never_whole(op)}
    if not broken_up and all(is_functional(op) for op in targets):
        return exported
    if not _is_simple(calls):
        return exported.run_decompositions(dict(table))
    bodies: dict[Any, Body | None] = {}
    kinds = {call: _kind(call) for call in calls if call.target in broken_up}
    try:
        for call, kind in kinds.items():
            if kind not in bodies:
                bodies[kind] = recorded(call, table)
    except NotRecordableError as error:
        _log.debug("traced as a whole: %s", error)
        return exported.run_decompositions(dict(table))
    _inline(exported.graph, {call: bodies[kind] for call, kind in kinds.items()})
    name_outputs(exported)
    exported.graph_module.recompile()
    return exported


def name_outputs(exported: ExportedProgram) -> None:
    """Let the signature call outputs what the graph now calls them."""
    outputs: Any = exported.graph.output_node().args[0]
    for spec, value in zip(exported.graph_signature.output_specs, outputs, strict=True):
        if isinstance(spec.arg, TensorArgument):
            spec.arg = TensorArgument(value.name)


def is_functional(op: Any) -> bool:
    """Whether it computes a value and does nothing else: no control flow, nothing that is written."""
    if isinstance(op, OpOverload):
        return not op._schema.is_mutable
    return getattr(op, "__module__", "") in ("_operator", "math", "torch")


def _is_simple(calls: Sequence[fx.Node]) -> bool:
    """Whether every call is of a functional op, with operands and values of known sizes."""
    for node in calls:
        if not is_functional(node.target):
            return False
        values = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
        for leaf in pytree.tree_leaves(values):
            if not isinstance(leaf, Tensor) or any(not isinstance(n, int) for n in leaf.shape):
                return False
    return True


def _kind(call: fx.Node) -> Any:
    """The op, its operands' sizes, strides and types, and its other arguments."""
    operands = call.all_input_nodes

    def described(leaf: Any) -> Any:
        if isinstance(leaf, fx.Node):
            value = leaf.meta["val"]
            sizes = tuple(value.shape), tuple(value.stride())
            return operands.index(leaf), *sizes, value.dtype, value.device
        return type(leaf), repr(leaf)

    leaves, spec = pytree.tree_flatten((list(call.args), dict(call.kwargs)))
    return call.target, tuple(described(leaf) for leaf in leaves), str(spec)


def _inline(graph: fx.Graph, bodies: Mapping[fx.Node, Body | None]) -> None:
    """Let each call give way to its body, those without one apart."""
    for call, body in bodies.items():
        if body is None:
            continue
        given = set(call.all_input_nodes)
        results = _put(graph, call, body)
        if isinstance(call.meta["val"], Tensor):
            _give_way(graph, call, results[0], given)
            continue
        for item in list(call.users):
            _give_way(graph, item, results[item.args[1]], given)  # type: ignore[index]
        graph.erase_node(call)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    graph.lint()


def _put(graph: fx.Graph, call: fx.Node, body: Body) -> dict[int, fx.Node]:
    """Insert what replaces a call before it.

    Returns:
        Place among the call's results → the node that gives it.
    """
    stands = dict(zip(body.given, call.all_input_nodes, strict=True))
    with graph.inserting_before(call):
        for node in body.calls():
            made = graph.node_copy(node, stands.__getitem__)
            made.meta = {name: call.meta[name] for name in ORIGIN if name in call.meta}
            made.meta["val"] = node.meta["val"]
            stands[node] = made
    return {place: stands[node] for place, node in body.results.items()}


def _give_way(graph: fx.Graph, old: fx.Node, new: fx.Node, given: Set[fx.Node]) -> None:
    """Let a value take another's place, and its name unless it was there before."""
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    if new not in given:
        new.name = old.name
