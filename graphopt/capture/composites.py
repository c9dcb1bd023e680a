"""What an exported graph may not keep is broken up call by call.

`ExportedProgram.run_decompositions` traces a whole program again to break up a handful of calls, which with
open sizes costs more than the export did. Where a program holds functional ops alone, it is enough to
record what these calls run.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from typing_extensions import override

from graphopt.ir import op_info
from graphopt.ir.decomposing import is_functional, name_outputs, never_whole
from graphopt.ir.editor import ORIGIN
from graphopt.ir.recording import own_value
from graphopt.ir.torch_private import FakeTensor, TorchDispatchMode

__all__ = ["break_up_composites"]

_FIND_A_SIZE = ("aten::view", "aten::_unsafe_view")
_size = torch.ops.aten.sym_size.int
_clone = torch.ops.aten.clone.default
# a tensor that the code makes of numbers
_NEW_CONSTANT = torch.ops.aten.lift_fresh_copy.default
_DETACHED = torch.ops.aten.detach_.default


class _NotRecordedError(Exception):
    """Only torch's own tracer can say what a call becomes."""


def break_up_composites(exported: ExportedProgram, rules: Set[Any]) -> bool:
    """Change a program to what `exported.run_decompositions` gives, or leave it as it is.

    Args:
        exported: What is changed.
        rules: Ops that torch's own rules replace; a program that holds one of these is left.

    Returns:
        Whether it was changed; a program that writes into tensors, holds control flow or
        norms in training is not.
    """
    calls = [node for node in exported.graph.nodes if node.op not in ("placeholder", "output")]
    try:
        if not all(_is_plain(call) and call.target not in rules for call in calls):
            raise _NotRecordedError
        sizes = _Sizes(exported.graph)
        broken_up = [call for call in calls if never_whole(call.target) and not _has_own_form(call)]
        pieces = {call: _recorded(call, sizes) for call in broken_up}
    except _NotRecordedError:
        return False
    for call in calls:
        if call.target is _NEW_CONSTANT:
            call.target = _clone
        elif call.target is _DETACHED:
            call.replace_all_uses_with(call.args[0])
            exported.graph.erase_node(call)
    stands: dict[fx.Node, fx.Node] = {}
    for call, piece in pieces.items():
        _put(call, piece, stands)
    name_outputs(exported)
    # what torch's tracer does not keep: conditions that only the example's sizes brought about
    exported._guards_code = []
    exported.graph.eliminate_dead_code()
    exported.graph.lint()
    exported.graph_module.recompile()
    return True


def _is_plain(call: fx.Node) -> bool:
    if op_info.is_training(call):
        return False
    return is_functional(call.target) or _is_detached_constant(call)


def _is_detached_constant(call: fx.Node) -> bool:
    """Whether it writes nothing but that a new constant has no gradient."""
    return call.target is _DETACHED and call.args[0].target is _NEW_CONSTANT  # type: ignore[union-attr]


def _has_own_form(call: fx.Node) -> bool:
    """Whether it is a dropout, noise or a norm, which `to_inference_form` knows more of than torch."""
    info = op_info.info_of(call)
    return info is not None and (info.dropout or info.noise or info.batch_norm is not None)


@dataclass(frozen=True)
class _Extent:
    """How many entries a value has along an axis."""

    of: fx.Node
    axis: int


class _Sizes:
    """Which node gives an open size."""

    def __init__(self, graph: fx.Graph) -> None:
        self._known: dict[Any, fx.Node] = {}
        self._place = {node: place for place, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                self._known.setdefault(value.node.expr, node)

    def source(self, size: torch.SymInt, call: fx.Node) -> Any:
        """What gives it before a call: a node, an operand's dimension, or None."""
        node = self._known.get(size.node.expr)
        if node is not None and self._place[node] < self._place[call]:
            return node
        for operand in call.all_input_nodes:
            for axis, extent in enumerate(getattr(operand.meta["val"], "shape", ())):
                if isinstance(extent, torch.SymInt) and extent.node.expr == size.node.expr:
                    return _Extent(operand, axis)
        return None


@dataclass
class _Step:
    """One op of what a call runs; operands are fake tensors, open sizes are what gives them."""

    op: Any
    args: Any
    kwargs: Any
    value: Any


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            # else it asks a tensor for its size or device
            self.steps.append(_Step(func, args, dict(kwargs or {}), value))
        return value


@dataclass
class _Piece:
    """What a call becomes: steps, and the fake tensors among their values that are its results."""

    operands: Mapping[fx.Node, Any]
    steps: Sequence[_Step]
    results: Sequence[Any]


def _recorded(call: fx.Node, sizes: _Sizes) -> _Piece:
    own = {node: own_value(node) for node in call.all_input_nodes}
    args, kwargs = fx.map_arg((call.args, call.kwargs), own.__getitem__)
    fakes = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
    if not fakes or not _reads_items_only(call):
        raise _NotRecordedError
    recorder = _Recorder()
    try:
        with torch.no_grad(), fakes[0].fake_mode, recorder:
            value = call.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        raise _NotRecordedError from error
    results = [value] if isinstance(value, Tensor) else list(value)
    known = {id(fake) for fake in fakes}
    for step in recorder.steps:
        step.args = _with_nodes(step, call, sizes)
        leaves = pytree.tree_leaves((step.args, step.kwargs))
        if not is_functional(step.op) or not all(_is_given(leaf, known) for leaf in leaves):
            raise _NotRecordedError
        known |= {id(leaf) for leaf in pytree.tree_leaves(step.value)}
    if not all(id(result) in known for result in results):
        raise _NotRecordedError
    return _Piece(own, recorder.steps, results)


def _reads_items_only(call: fx.Node) -> bool:
    return isinstance(call.meta.get("val"), Tensor) or all(
        user.target is operator.getitem for user in call.users
    )


def _is_given(leaf: Any, known: set[int]) -> bool:
    if isinstance(leaf, Tensor):
        return id(leaf) in known
    return not isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool)


def _with_nodes(step: _Step, call: fx.Node, sizes: _Sizes) -> Any:
    """A step's arguments with what gives its open sizes.

    A size that nothing gives is left to the op, where it finds one itself.
    """
    leaves, spec = pytree.tree_flatten(step.args)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.SymInt)]
    given = {place: sizes.source(leaves[place], call) for place in places}
    missing = [place for place, source in given.items() if source is None]
    finds = getattr(getattr(step.op, "_schema", None), "name", "") in _FIND_A_SIZE
    finds &= not any(isinstance(leaf, int) and leaf == -1 for leaf in leaves)
    if len(missing) > int(finds):
        raise _NotRecordedError
    for place, source in given.items():
        leaves[place] = -1 if source is None else source
    return pytree.tree_unflatten(leaves, spec)


def _put(call: fx.Node, piece: _Piece, stands: dict[fx.Node, fx.Node]) -> None:
    """Let a call give way to what it runs; `stands` says what others have given way to."""
    graph = call.graph
    nodes = {id(value): stands.get(node, node) for node, value in piece.operands.items()}

    def node_of(leaf: Any) -> Any:
        if isinstance(leaf, _Extent):
            size = graph.call_function(_size, (stands.get(leaf.of, leaf.of), leaf.axis))
            size.meta["val"] = leaf.of.meta["val"].shape[leaf.axis]
            return size
        return nodes[id(leaf)] if isinstance(leaf, Tensor) else leaf

    with graph.inserting_before(call):
        for step in piece.steps:
            args, kwargs = pytree.tree_map(node_of, (step.args, step.kwargs))
            name = step.op._schema.name.rpartition("::")[2]
            made = graph.create_node("call_function", step.op, args, kwargs, name)
            made.meta.update({key: call.meta[key] for key in ORIGIN if key in call.meta})
            made.meta["val"] = step.value
            for place, leaf in enumerate([] if isinstance(step.value, Tensor) else step.value):
                nodes[id(leaf)] = item = graph.call_function(operator.getitem, (made, place))
                item.meta.update({**made.meta, "val": leaf})
            nodes[id(step.value)] = made
    results = [nodes[id(result)] for result in piece.results]
    given_way = {call: results[0]} if isinstance(call.meta["val"], Tensor) else {}
    given_way |= {item: results[item.args[1]] for item in call.users if not given_way}  # type: ignore[index]
    for old, new in given_way.items():
        old.replace_all_uses_with(new)
        graph.erase_node(old)
    if call not in given_way:
        graph.erase_node(call)
    stands |= given_way
