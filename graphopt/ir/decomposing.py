"""Decomposition of what a table names, and of nothing else: each distinct call is traced once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from graphopt.ir import torch_private
from graphopt.ir.editor import ORIGIN
from graphopt.ir.torch_private import FakeTensor, OpOverload

__all__ = ["decomposed", "is_functional", "name_outputs", "never_whole"]

Table = Mapping[Any, Callable[..., Any]]


def decomposed(exported: ExportedProgram, table: Table) -> ExportedProgram:
    """What `exported.run_decompositions(table)` computes, at the cost of the ops that are decomposed.

    That traces a whole program again. Here the calls of ops in the table become a program of their
    own, one for each op, sizes, types and arguments; torch decomposes that, and each call in the graph
    gives way to what came out of its like.

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
    likes = _Likes([call for call in calls if call.target in broken_up], table)
    if not likes.first:
        return exported
    traced = likes.program().run_decompositions(dict(table))
    if any(spec.kind is not InputKind.USER_INPUT for spec in traced.graph_signature.input_specs):
        # a rule has made a tensor of its own, which torch finds a place for
        return exported.run_decompositions(dict(table))
    _inline(exported.graph, likes, _Pieces(traced, likes))
    name_outputs(exported)
    exported.graph_module.recompile()
    return exported


def name_outputs(exported: ExportedProgram) -> None:
    """Let the signature call outputs what the graph now calls them."""
    outputs: Any = exported.graph.output_node().args[0]
    for spec, value in zip(exported.graph_signature.output_specs, outputs, strict=True):
        if isinstance(spec.arg, TensorArgument):
            spec.arg = TensorArgument(value.name)


def never_whole(op: Any) -> bool:
    """Whether torch breaks up an op whatever the table says: a composite one that gives a view."""
    if not isinstance(op, OpOverload) or not torch_private.is_composite(op):
        return False
    return not torch_private.may_stay_whole(op)


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


class _Likes:
    """The calls that a table changes by what tells them apart, and a program of one of each kind.

    Attributes:
        first: Kind → its first call.
        keys: Call → its kind.
    """

    def __init__(self, calls: Sequence[fx.Node], table: Table) -> None:
        self.first: dict[Any, fx.Node] = {}
        keys = {node: _key(node) for node in calls}
        stay = set()
        for node, key in keys.items():
            if key in self.first or key in stay:
                continue
            if node.target in table and _stays(node, table[node.target]):
                stay.add(key)
            else:
                self.first[key] = node
        self.keys = {node: key for node, key in keys.items() if key not in stay}

    def program(self) -> ExportedProgram:
        """A program of one call of each kind, inputs and outputs in the order of `first`."""
        graph = fx.Graph()
        inputs: dict[fx.Node, list[fx.Node]] = {
            call: [
                self._input(graph, f"u{number}_{place}", operand)
                for place, operand in enumerate(call.all_input_nodes)
            ]
            for number, call in enumerate(self.first.values())
        }
        results = []
        for call, given in inputs.items():
            stands = dict(zip(call.all_input_nodes, given, strict=True))
            made = graph.node_copy(call, stands.__getitem__)
            results += _results(graph, made)
        graph.output(tuple(results))
        names = [node.name for given in inputs.values() for node in given]
        fakes = tuple(node.meta["val"] for given in inputs.values() for node in given)
        signature = ExportGraphSignature(
            [InputSpec(InputKind.USER_INPUT, TensorArgument(name), None) for name in names],
            [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(x.name), None) for x in results],
        )
        spec, out_spec = pytree.tree_structure((fakes, {})), pytree.tree_structure(tuple(results))
        calls = [ModuleCallEntry("", ModuleCallSignature([], [], spec, out_spec, names))]
        return ExportedProgram(nn.Module(), graph, signature, {}, {}, calls)

    @staticmethod
    def _input(graph: fx.Graph, name: str, operand: fx.Node) -> fx.Node:
        like: FakeTensor = operand.meta["val"]
        made = graph.placeholder(name)
        with like.fake_mode:
            made.meta["val"] = torch.empty_strided(
                like.shape, like.stride(), dtype=like.dtype, device=like.device
            )
        return made


def _stays(call: fx.Node, rule: Callable[..., Any]) -> bool:
    """Whether a rule leaves a call as it is, as many do but for certain arguments."""
    args, kwargs = fx.map_arg((call.args, call.kwargs), lambda node: node.meta["val"])
    fakes = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
    if not fakes:
        return False
    try:
        with fakes[0].fake_mode, torch.no_grad():
            return rule(*args, **kwargs) is NotImplemented
    except Exception:
        return False  # it fails again where the call is traced


def _key(call: fx.Node) -> Any:
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


def _results(graph: fx.Graph, made: fx.Node) -> list[fx.Node]:
    """A call that gives a tensor, or its items that are tensors."""
    value = made.meta["val"]
    if isinstance(value, Tensor):
        return [made]
    items = []
    for place, each in enumerate(value):
        if isinstance(each, Tensor):
            item = graph.call_function(operator.getitem, (made, place))
            item.meta["val"] = each
            items.append(item)
    return items


class _Pieces:
    """What torch made of the program of one call each, taken apart again."""

    def __init__(self, traced: ExportedProgram, likes: _Likes) -> None:
        given = list(traced.graph.find_nodes(op="placeholder"))
        results = list(traced.graph.output_node().args[0])
        self._given: dict[Any, list[fx.Node]] = {}
        self._results: dict[Any, dict[int, fx.Node]] = {}
        for key, call in likes.first.items():
            operands, value = call.all_input_nodes, call.meta["val"]
            self._given[key], given = given[: len(operands)], given[len(operands) :]
            leaves = (value,) if isinstance(value, Tensor) else value
            places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            self._results[key] = dict(zip(places, results, strict=False))
            results = results[len(places) :]
        self._bodies = {key: _behind(traced.graph, self._results[key]) for key in likes.first}

    def put(self, graph: fx.Graph, call: fx.Node, key: Any) -> dict[int, fx.Node]:
        """Insert what replaces a call before it.

        Returns:
            Place among the call's results → the node that gives it.
        """
        stands = dict(zip(self._given[key], call.all_input_nodes, strict=True))
        with graph.inserting_before(call):
            for node in self._bodies[key]:
                made = graph.node_copy(node, stands.__getitem__)
                made.meta = {name: call.meta[name] for name in ORIGIN if name in call.meta}
                made.meta["val"] = node.meta["val"]
                stands[node] = made
        return {place: stands[node] for place, node in self._results[key].items()}


def _behind(graph: fx.Graph, results: Mapping[int, fx.Node]) -> list[fx.Node]:
    """The calls that these values need, in order."""
    needed, open_ends = set(), list(results.values())
    while open_ends:
        node = open_ends.pop()
        if node.op == "call_function" and node not in needed:
            needed.add(node)
            open_ends += node.all_input_nodes
    return [node for node in graph.nodes if node in needed]


def _inline(graph: fx.Graph, likes: _Likes, pieces: _Pieces) -> None:
    """Let each call give way to what its kind has become."""
    for call, key in likes.keys.items():
        given = set(call.all_input_nodes)
        results = pieces.put(graph, call, key)
        if isinstance(call.meta["val"], Tensor):
            _give_way(graph, call, results[0], given)
            continue
        for item in list(call.users):
            _give_way(graph, item, results[item.args[1]], given)  # type: ignore[index]
        graph.erase_node(call)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    graph.lint()


def _give_way(graph: fx.Graph, old: fx.Node, new: fx.Node, given: Set[fx.Node]) -> None:
    """Let a value take another's place, and its name unless it was there before."""
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    if new not in given:
        new.name = old.name
