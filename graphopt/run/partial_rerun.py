"""Run a graph once, and again only from one weight on.

What lies before a weight, or beside it, has the values of the uncompressed run; those are computed
once, when first needed, and dropped when no later weight can need them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.ir import op_info
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import operands
from graphopt.run.batches import Batch, explained
from graphopt.run.interpreter import Hook, Hooks, Interpreter, Value

__all__ = ["Downstream", "PartialRerun", "RerunPlan"]


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


class RerunPlan(Interpreter):
    """A graph whose nodes run again with other weights.

    Args:
        gm: The graph; it must not change.
    """

    def __init__(self, gm: CapturedModule) -> None:
        super().__init__(gm, copies=True)

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
            if node.op == "output" or not any(operand in dirty for operand in used):
                continue
            dirty.add(node)
            nodes.append(node)
            for operand in used:
                last[operand] = node
            if node is until:
                break
        moving = [self.place[node] for node in nodes if node not in self.constant]
        return Downstream(
            tuple(sources), tuple(nodes), last, min(moving, default=0), frozenset(nodes)
        )


class PartialRerun:
    """One batch through a graph, with re-runs from single weights on.

    Args:
        plan: The graph.
        batch: Inputs of one call.
    """

    def __init__(self, plan: RerunPlan, batch: Batch) -> None:
        self.plan = plan
        self._batch = batch
        self._exact: dict[fx.Node, Any] = plan.inputs(batch)
        self._passed = 0

    @torch.no_grad()
    def reference(self) -> list[Tensor]:
        """Outputs of the uncompressed graph; no values are kept."""
        return _tensors(self.plan.run(self._batch))

    @torch.no_grad()
    def exact(self, node: fx.Node) -> Any:
        """A node's value in the uncompressed graph."""
        if node not in self._exact:
            missing, stack = set(), [node]
            while stack:
                needed = stack.pop()
                if needed not in self._exact and needed not in missing:
                    missing.add(needed)
                    stack += operands(needed)
            with explained(self.plan.gm, self._batch):
                self.plan.walk(sorted(missing, key=self.plan.place.__getitem__), self._exact)
        return self._exact[node]

    def advance(self, place: int) -> None:
        """Run the uncompressed graph up to `place`, dropping what later nodes do not read.

        Later calls must not go back.
        """
        for number in range(self._passed, place):
            node = self.plan.nodes[number]
            if (
                node not in self.plan.given
                and node.op != "output"
                and node not in self.plan.constant
            ):
                self.exact(node)
            for held in (*node.all_input_nodes, node):
                read_until = self.plan.last.get(held, held)
                if self.plan.place[read_until] <= number and held not in self.plan.given:
                    self._exact.pop(held, None)
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
        inside, kept = {*below.sources, *below.nodes}, {*wanted}

        def overwriting(node: fx.Node, value: Value) -> Any:
            hooked = before is not None and node in before
            if not hooked and _may_overwrite(node, below, kept):
                return _overwriting(node, value)
            return self.plan.call(node, value)

        self.plan.walk(
            below.nodes,
            values,
            outside=self.exact,
            last=below.last,
            kept=kept,
            hooks=Hooks(before or {}, behind or {}),
            call=None if torch.is_grad_enabled() else overwriting,
        )
        return [values[node] if node in inside else self.exact(node) for node in wanted]

    def outputs(
        self, below: Downstream, weights: Mapping[fx.Node, Tensor], **hooks: Any
    ) -> list[Tensor]:
        """Outputs of the graph when weights are other ones; arguments as for `values`."""
        return _tensors(self.values(below, weights, self.plan.results(), **hooks))


def _is_fresh(node: fx.Node) -> bool:
    """Whether a node's tensor shares its memory with no other value."""
    if node.target is operator.getitem:
        first = node.args[1] == 0
        return bool(first) and op_info.is_batch_norm(node.args[0])
    info = op_info.info_of(node)
    return info is not None and info.fresh


def _may_overwrite(node: fx.Node, below: Downstream, kept: set[fx.Node]) -> bool:
    """Whether an activation function or a sum can take the memory of its first operand.

    Fresh memory costs as much as the arithmetic there.
    """
    info = op_info.info_of(node)
    if info is None or info.in_place is None or node.kwargs:
        return False
    first = node.args[0]
    if not isinstance(first, fx.Node) or first in kept or not _is_fresh(first):
        return False
    shape = getattr(first.meta.get("val"), "shape", None)
    same = shape is not None and bool(shape == getattr(node.meta.get("val"), "shape", None))
    alone = len(node.all_input_nodes) == len(node.args)
    ends_here = below.last.get(first) is node and first in below.members
    return same and alone and ends_here


def _overwriting(node: fx.Node, given: Value) -> Any:
    values: Any = fx.map_arg(node.args, given)
    info = op_info.info_of(node)
    assert info is not None
    first, *others = values
    if any(isinstance(other, Tensor) and other.dtype != first.dtype for other in others):
        return node.target(*values)  # type: ignore[operator]
    return info.in_place(*values)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(list(values)) if isinstance(leaf, Tensor)]
