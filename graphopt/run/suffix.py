"""Run a graph once, and again only from one weight on.

What lies before a weight, or beside it, has the values of the uncompressed run; those are computed
once, when first needed, and dropped when no later weight can need them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.ir.captured_module import CapturedModule, holder_of
from graphopt.ir.editor import operands
from graphopt.run.layerwise import Batch, explained, flat_inputs

__all__ = ["Downstream", "GraphPlan", "SuffixRun", "call_node"]

Hook = Callable[[Any], Any]


@dataclass(frozen=True)
class Downstream:
    """What depends on some weights.

    Attributes:
        sources: The `get_attr` nodes of the weights.
        nodes: Everything that depends on them, in order, without the output node.
        last: Node → the last of `nodes` that reads it.
        first: Place of the first op that is no view of a constant.
        members: `nodes`, for asking.
    """

    sources: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    last: dict[fx.Node, fx.Node]
    first: int
    members: frozenset[fx.Node]


class GraphPlan:
    """The order of a graph, who reads what last, and which values are the same for all inputs.

    Args:
        gm: The graph; it must not change.
    """

    def __init__(self, gm: CapturedModule) -> None:
        self.gm = gm
        self.nodes = list(gm.graph.nodes)
        self.place = {node: number for number, node in enumerate(self.nodes)}
        self.by_name = {node.name: node for node in self.nodes}
        self.last_reader = {
            node: max((self.place[user] for user in node.users), default=-1) for node in self.nodes
        }
        (self.output,) = gm.graph.find_nodes(op="output")
        self.constant: set[fx.Node] = set()
        for node in self.nodes:
            used = operands(node)
            fixed = bool(used) and all(each in self.constant for each in used)
            if node.op == "get_attr" or (fixed and node.op != "output"):
                self.constant.add(node)

    def downstream(self, sources: Sequence[fx.Node], until: fx.Node | None = None) -> Downstream:
        """Everything that depends on `sources`.

        Args:
            sources: Constants.
            until: Stop behind this node.
        """
        dirty = set(sources)
        nodes = []
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes[min(self.place[source] for source in sources) :]:
            used = operands(node)
            if node.op == "output" or not any(each in dirty for each in used):
                continue
            dirty.add(node)
            nodes.append(node)
            for each in used:
                last[each] = node
            if node is until:
                break
        moving = [self.place[node] for node in nodes if node not in self.constant]
        return Downstream(
            tuple(sources), tuple(nodes), last, min(moving, default=0), frozenset(nodes)
        )

    def results(self) -> list[fx.Node]:
        """Nodes that the output reads."""
        return operands(self.output)


def call_node(gm: CapturedModule, node: fx.Node, given: Callable[[fx.Node], Any]) -> Any:
    """Compute one node from the values of what it reads."""
    args, kwargs = fx.map_arg(node.args, given), fx.map_arg(node.kwargs, given)
    if node.op == "get_attr":
        holder, name = holder_of(gm, str(node.target))
        return getattr(holder, name)
    target: Any = node.target
    if node.op == "call_module":
        target = gm.get_submodule(str(target))
    elif node.op == "call_method":
        return getattr(args[0], str(target))(*args[1:], **kwargs)
    schema = getattr(target, "_schema", None)
    if schema is not None and schema.is_mutable:
        args = pytree.tree_map_only(Tensor, Tensor.clone, args)
    return target(*args, **kwargs)


class SuffixRun:
    """One batch through a graph, with re-runs from single weights on.

    Args:
        plan: The graph.
        batch: Inputs of one call.
    """

    def __init__(self, plan: GraphPlan, batch: Batch) -> None:
        self.plan = plan
        self._batch = batch
        placeholders = plan.gm.graph.find_nodes(op="placeholder")
        self._inputs = dict(zip(placeholders, flat_inputs(plan.gm, batch), strict=True))
        self._exact: dict[fx.Node, Any] = dict(self._inputs)
        self._passed = 0

    @torch.no_grad()
    def reference(self) -> list[Tensor]:
        """Outputs of the uncompressed graph; no values are kept."""
        values: dict[fx.Node, Any] = dict(self._inputs)
        place, last = self.plan.place, self.plan.last_reader
        for node in self.plan.nodes:
            if node.op in ("placeholder", "output"):
                continue
            with explained(self.plan.gm, self._batch):
                values[node] = call_node(self.plan.gm, node, values.__getitem__)
            for each in (*operands(node), node):
                if last[each] <= place[node] and each in values:
                    del values[each]
        return _tensors(values[node] for node in self.plan.results())

    @torch.no_grad()
    def exact(self, node: fx.Node) -> Any:
        """A node's value in the uncompressed graph."""
        if node not in self._exact:
            missing, stack = set(), [node]
            while stack:
                each = stack.pop()
                if each not in self._exact and each not in missing:
                    missing.add(each)
                    stack += operands(each)
            for each in sorted(missing, key=self.plan.place.__getitem__):
                with explained(self.plan.gm, self._batch):
                    self._exact[each] = call_node(self.plan.gm, each, self._exact.__getitem__)
        return self._exact[node]

    def advance(self, place: int) -> None:
        """Run the uncompressed graph up to `place`, dropping what later nodes do not read.

        Later calls must not go back.
        """
        for number in range(self._passed, place):
            node = self.plan.nodes[number]
            if node.op not in ("placeholder", "output") and node not in self.plan.constant:
                self.exact(node)
            for each in (*node.all_input_nodes, node):
                if self.plan.last_reader[each] <= number and each.op != "placeholder":
                    self._exact.pop(each, None)
        self._passed = max(self._passed, place)

    def values(
        self,
        below: Downstream,
        weights: Mapping[fx.Node, Tensor],
        wanted: Sequence[fx.Node],
        *,
        before: Mapping[fx.Node, Hook] | None = None,
        behind: Mapping[fx.Node, Hook] | None = None,
    ) -> list[Any]:
        """Values of some nodes when weights are other ones, without an autograd graph.

        Args:
            below: What depends on the weights.
            weights: `get_attr` node → the value that it takes.
            wanted: Nodes to return.
            before: Op → what becomes of its data input, its first argument that moves.
            behind: Op → what becomes of its output.
        """
        with torch.no_grad():
            return self._values(below, weights, wanted, before, behind)

    def traced_outputs(
        self,
        below: Downstream,
        weights: Mapping[fx.Node, Tensor],
        *,
        before: Mapping[fx.Node, Hook] | None = None,
    ) -> list[Tensor]:
        """Like `outputs`, with an autograd graph from the weights on."""
        return _tensors(self._values(below, weights, self.plan.results(), before, None))

    def _values(
        self,
        below: Downstream,
        weights: Mapping[fx.Node, Tensor],
        wanted: Sequence[fx.Node],
        before: Mapping[fx.Node, Hook] | None,
        behind: Mapping[fx.Node, Hook] | None,
    ) -> list[Any]:
        values: dict[fx.Node, Any] = dict(weights)
        dirty = {*below.sources, *below.nodes}
        kept = {*wanted}
        reuse = not torch.is_grad_enabled()

        def value(node: fx.Node) -> Any:
            return values[node] if node in dirty else self.exact(node)

        for node in below.nodes:
            if before and node in before:
                moving = next(each for each in operands(node) if each not in self.plan.constant)
                changed = before[node](value(moving))
                found = call_node(self.plan.gm, node, _with(value, moving, changed))
            elif reuse and _may_overwrite(node, below, kept):
                found = _overwriting(node, value)
            else:
                found = call_node(self.plan.gm, node, value)
            values[node] = behind[node](found) if behind and node in behind else found
            for each in operands(node):
                if below.last.get(each) is node and each in values and each not in kept:
                    del values[each]
            if node not in below.last and node not in kept:
                del values[node]
        return [value(node) for node in wanted]

    def outputs(
        self, below: Downstream, weights: Mapping[fx.Node, Tensor], **hooks: Any
    ) -> list[Tensor]:
        """Outputs of the graph when weights are other ones; arguments as for `values`."""
        return _tensors(self.values(below, weights, self.plan.results(), **hooks))


_aten = torch.ops.aten
_NORM = _aten._native_batch_norm_legit_no_training.default
_FRESH = {
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.linear.default),
    *(_aten.add.Tensor, _aten.mul.Tensor, _aten.relu.default, _aten.convolution.default),
}


def _is_fresh(node: fx.Node) -> bool:
    """Whether a node's tensor shares its memory with no other value."""
    if node.target is operator.getitem:
        first = node.args[1] == 0
        return bool(first) and getattr(node.args[0], "target", None) is _NORM
    return node.target in _FRESH


def _may_overwrite(node: fx.Node, below: Downstream, kept: set[fx.Node]) -> bool:
    """Whether an activation function or a sum can take the memory of its first operand.

    Fresh memory costs as much as the arithmetic there.
    """
    if node.target not in (_aten.relu.default, _aten.add.Tensor) or node.kwargs:
        return False
    first = node.args[0]
    if not isinstance(first, fx.Node) or first in kept or not _is_fresh(first):
        return False
    shape = getattr(first.meta.get("val"), "shape", None)
    same = shape is not None and bool(shape == getattr(node.meta.get("val"), "shape", None))
    alone = len(node.all_input_nodes) == len(node.args)
    ends_here = below.last.get(first) is node and first in below.members
    return same and alone and ends_here


def _overwriting(node: fx.Node, given: Callable[[fx.Node], Any]) -> Any:
    values: Any = fx.map_arg(node.args, given)
    first, *others = values
    if node.target is _aten.relu.default:
        return first.relu_()
    if isinstance(others[0], Tensor) and others[0].dtype != first.dtype:
        return first + others[0]
    return first.add_(others[0])


def _with(
    value: Callable[[fx.Node], Any], changed: fx.Node, result: Any
) -> Callable[[fx.Node], Any]:
    return lambda node: result if node is changed else value(node)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(list(values)) if isinstance(leaf, Tensor)]
