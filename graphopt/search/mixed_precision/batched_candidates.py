"""Run several candidates of a layer side by side, as one larger batch behind its op.

Small networks spend their time on calls, not on arithmetic; one call for all candidates of a layer
then costs little more than one for each. It needs a graph whose values have the batch in front
throughout, which symbolic shapes tell; that no op mixes samples is checked by running the first
candidate alone once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.run.partial_rerun import Downstream, PartialRerun, RerunPlan

__all__ = ["CandidateBatcher"]

_ELEMENTS = 1 << 22  # of the largest value behind the layer, all candidates together
_TOLERANCE = 1e-4


class CandidateBatcher:
    """Knows which layers of a graph can be stacked.

    Args:
        plan: The graph.
    """

    def __init__(self, plan: RerunPlan) -> None:
        self.plan = plan
        self.batch = _batch_symbol(plan)
        self._refused: set[fx.Node] = set()
        self._checked: set[fx.Node] = set()

    def width(self, run: PartialRerun, below: Downstream, op: fx.Node, count: int) -> int:
        """How many candidates of a layer may run at a time.

        Args:
            run: The batch.
            below: What depends on the layer.
            op: The only op that reads it.
            count: Number of candidates.
        """
        if self.batch is None or op in self._refused:
            return 1
        rest = self._rest(below, op)
        bindings = _bindings(self.plan, run)
        sizes = [_size(node, bindings) for node in (op, *rest)]
        largest = max((size for size in sizes if size is not None), default=0)
        if None in sizes or not all(self._in_front(node) for node in (op, *rest)):
            self._refused.add(op)
            return 1
        return max(1, min(count, _ELEMENTS // max(largest, 1)))

    def outputs(
        self,
        run: PartialRerun,
        below: Downstream,
        op: fx.Node,
        weights: Sequence[Mapping[fx.Node, Tensor]],
        hooks: Sequence[Mapping[str, Any]],
    ) -> list[list[Tensor]] | None:
        """Outputs for each candidate, None where they have to be run one by one.

        Args:
            run: The batch.
            below: What depends on the layer.
            op: The only op that reads it.
            weights: For each candidate, `get_attr` node → value.
            hooks: For each candidate, hooks of `PartialRerun.values`.
        """
        if op in self._refused:
            return None
        local = self.plan.downstream(below.sources, op)
        heads = [
            run.values(local, weight, [op], **own)[0]
            for weight, own in zip(weights, hooks, strict=True)
        ]
        bindings = _bindings(self.plan, run)
        rest = self._rest(below, op)
        stacked = self._tail(run, op, rest, torch.cat(heads), len(heads), bindings)
        if stacked is None or not self._holds(run, op, below, weights[0], hooks[0], stacked):
            self._refused.add(op)
            return None
        return stacked

    def _rest(self, below: Downstream, op: fx.Node) -> list[fx.Node]:
        """What runs behind a layer's op."""
        return [node for node in below.nodes if self.plan.place[node] > self.plan.place[op]]

    def _tail(
        self,
        run: PartialRerun,
        op: fx.Node,
        rest: Sequence[fx.Node],
        head: Tensor,
        count: int,
        bindings: Mapping[Any, int],
    ) -> list[list[Tensor]] | None:
        values: dict[fx.Node, Any] = {op: head}
        wider = {**bindings, self.batch: bindings[self.batch] * count}
        inside = {op, *rest}
        last = {node: reader for reader in rest for node in reader.all_input_nodes}
        wanted = self.plan.results()
        repeated: dict[fx.Node, Any] = {}

        def outside(node: fx.Node) -> Any:
            if node not in repeated:
                repeated[node] = self._repeated(node, run.exact(node), count, wider)
            return repeated[node]

        with torch.no_grad():
            try:
                self.plan.walk(rest, values, outside=outside, last=last, kept=set(wanted))
                outputs = [values[node] if node in inside else outside(node) for node in wanted]
            except RuntimeError:  # a view with a fixed batch, and the like
                return None
        leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
        if any(leaf.ndim == 0 or leaf.shape[0] % count for leaf in leaves):
            return None
        return [list(parts) for parts in zip(*(leaf.chunk(count) for leaf in leaves), strict=True)]

    def _repeated(self, node: fx.Node, exact: Any, count: int, wider: Mapping[Any, int]) -> Any:
        """A value of the uncompressed run, once for every candidate."""
        if isinstance(exact, Tensor):
            if node in self.plan.constant or not self._has_batch(node):
                return exact
            return exact.repeat(count, *[1] * (exact.ndim - 1))
        expression = getattr(getattr(node.meta.get("val"), "node", None), "expr", None)
        if expression is not None and self.batch in expression.free_symbols:
            return int(expression.subs(wider))
        return exact

    def _in_front(self, node: fx.Node) -> bool:
        """Whether all of a node's tensors have a multiple of the batch as their first dimension."""
        leaves = [
            leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)
        ]
        return all(_leads(leaf, self.batch) for leaf in leaves if leaf.numel() != 0)

    def _has_batch(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, Tensor) and value.ndim > 0 and _leads(value, self.batch)

    def _holds(
        self,
        run: PartialRerun,
        op: fx.Node,
        below: Downstream,
        weights: Mapping[fx.Node, Tensor],
        hooks: Mapping[str, Any],
        stacked: Sequence[Sequence[Tensor]],
    ) -> bool:
        """Whether the first candidate alone gives the same; asked once per layer."""
        if op in self._checked:
            return True
        self._checked.add(op)
        alone = run.outputs(below, weights, **hooks)
        return all(
            got.shape == want.shape and _close(got, want)
            for got, want in zip(stacked[0], alone, strict=True)
        )


def _close(got: Tensor, want: Tensor) -> bool:
    if not want.is_floating_point():
        return bool((got == want).all())
    scale = float(want.abs().max()) if want.numel() else 0.0
    return bool(((got - want).abs() <= _TOLERANCE * scale).all())


def _symbols(size: Any) -> Any:
    return getattr(getattr(size, "node", None), "expr", None)


def _batch_symbol(plan: RerunPlan) -> Any:
    """The symbol of the first dimension that all inputs share, None where there is none."""
    symbols = set()
    for node in plan.gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.ndim == 0:
            return None
        symbols.add(_symbols(value.shape[0]))
    (symbol,) = symbols if len(symbols) == 1 else (None,)
    return symbol if symbol is not None and symbol.is_Symbol else None


def _leads(value: Tensor, symbol: Any) -> bool:
    first, *others = value.shape
    expression = _symbols(first)
    if expression is None or any(
        symbol in size.free_symbols for size in map(_symbols, others) if size is not None
    ):
        return False
    ratio = expression / symbol
    return bool(ratio.is_Integer and ratio > 0)


def _bindings(plan: RerunPlan, run: PartialRerun) -> dict[Any, int]:
    """Symbol → size in this batch."""
    bindings = {}
    for node in plan.gm.graph.find_nodes(op="placeholder"):
        value, given = node.meta.get("val"), run.exact(node)
        if isinstance(value, Tensor) and isinstance(given, Tensor):
            for size, actual in zip(value.shape, given.shape, strict=True):
                expression = _symbols(size)
                if expression is not None and expression.is_Symbol:
                    bindings[expression] = int(actual)
    return bindings


def _size(node: fx.Node, bindings: Mapping[Any, int]) -> int | None:
    """Elements of a node's largest tensor; None where that depends on the data."""
    largest = 0
    for leaf in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(leaf, Tensor):
            count = 1
            for size in leaf.shape:
                expression = _symbols(size)
                known = size if expression is None else expression.subs(bindings)
                if getattr(known, "free_symbols", None):
                    return None
                count *= int(known)
            largest = max(largest, count)
    return largest
