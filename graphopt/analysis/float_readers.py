"""Which ops no target computes with integers, and which values only such ops read.

Layers and products of matrices round what they read, whatever it is. Arithmetic in between (sums,
products, joins, averages) is computed with integers only where all its operands come as integers, and
its result is read as such. Where the target is not known, linear layers may give floats, as those of
ONNX Runtime do, convolutions give integers, as both its own and XNNPACK's do, activation functions
belong to the op before. What leaves the program leaves it in float, and so do the convolutions that
lead to nothing else: who reads it gets floats in any case, and steps of eight bits there often cost more
than all those before. XNNPACK's last layer computes with integers only where its result is rounded, so
for that target it is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from graphopt.analysis.value_facts import is_float, norm_reading
from graphopt.ir import op_info
from graphopt.ir.editor import operands
from graphopt.ir.op_info import OpInfo, Scales

__all__ = ["LEAVES", "FloatReaders", "lacking"]

LEAVES = "it leaves the program, whose results are floats"
_ATEN = "aten."  # ops of torch that the table does not know have no kernels with integers


@dataclass
class FloatReaders:
    """What is computed in float in a graph.

    Attributes:
        gm: The graph.
        data: From `data_values`.
        scores: From `attention_scores`.
        fused: Activation functions that the target computes with the op before; None for all.
        float_ops: Names of ops that the target computes in float, as it has no other kernel.
        integer_results: Whether the target rounds what leaves the program.
    """

    gm: fx.GraphModule
    data: set[fx.Node]
    scores: set[fx.Node]
    fused: frozenset[str] | None = None
    float_ops: frozenset[str] = frozenset()
    integer_results: bool = False

    def is_product(self, node: fx.Node, info: OpInfo) -> bool:
        """Whether an op is a layer or a product of matrices, on whose account values are rounded."""
        layer = bool(info.weights) and bool(info.data)
        return info.scales is Scales.COMPUTE and (layer or info.attention in ("product", "whole"))

    def lacks_kernel(self, node: fx.Node, info: OpInfo) -> bool:
        """Whether the target computes an op with floats alone; a weight makes it another op."""
        if self.float_ops.isdisjoint(info.names):
            return False
        weights = (op_info.argument(node, slot.position) for slot in info.weights)
        return all(not isinstance(w, fx.Node) or w in self.data for w in weights)

    def _computes(self, node: fx.Node, info: OpInfo) -> bool:
        return self.is_product(node, info) and not self.lacks_kernel(node, info)

    @cached_property
    def lone(self) -> dict[fx.Node, str]:
        """Arithmetic that no kernel computes with integers → why."""
        whole: set[fx.Node] = set()
        found: dict[fx.Node, str] = {}
        for node in self.gm.graph.nodes:
            if node.op != "call_function" or node not in self.data:
                whole.add(node)
                continue
            info, read = op_info.info_of(node), operands(node)
            if self._hands_on(node, info) or self._is_fused(info):
                if read and read[0] in whole:
                    whole.add(node)
            elif info is None or info.scales not in (Scales.COMPUTE, Scales.SHARE):
                continue
            elif self.is_product(node, info):
                if self._computes(node, info) and node not in self.scores:
                    whole.add(node)
            elif not info.both_data or sum(x in self.data for x in read) > 1:
                given = [x for x in read if x in self.data and is_float(x)]
                loose = [x for x in given if x not in whole and x not in self._multiplied]
                if self.lacks_kernel(node, info):
                    found[node] = lacking(info)
                elif loose:
                    found[node] = f"its operand {loose[0].name} is computed in float"
                elif given:
                    whole.add(node)
        return found

    def _hands_on(self, node: fx.Node, info: OpInfo | None) -> bool:
        """Whether integers stay integers: in views, clamps, and batch norms that convolutions take up."""
        if node.target is operator.getitem or op_info.is_batch_norm(node):
            return True
        if info is None:
            return False
        if info.activation is not None:
            return info.scales is Scales.PASS or "hardtanh" in info.names
        return info.scales is Scales.PASS or info.cast or info.dropout or info.copies

    def _is_fused(self, info: OpInfo | None) -> bool:
        if info is None or info.activation is None:
            return False
        return self.fused is None or info.names[0] in self.fused

    @cached_property
    def _multiplied(self) -> set[fx.Node]:
        """Values that a layer or a product of matrices reads, be it through views."""
        found: set[fx.Node] = set()
        for node in reversed(self.gm.graph.nodes):
            for user in node.users:
                info = op_info.info_of(user)
                if self._hands_on(user, info):
                    if user in found:
                        found.add(node)
                elif info is not None and self._computes(user, info):
                    found.add(node)
        return found

    @cached_property
    def ends(self) -> dict[fx.Node, str]:
        """Value that only ops in float read → who they are."""
        found: dict[fx.Node, str] = {}
        for node in reversed(self.gm.graph.nodes):
            reasons = [self._in_float(node, user, found) for user in node.users if not _asks(user)]
            if reasons and all(reasons):
                found[node] = next((reason for reason in reasons if reason != LEAVES), LEAVES)
        return found

    @cached_property
    def tail(self) -> set[fx.Node]:
        """Values that lead to results and to no layer or product of matrices."""
        found: set[fx.Node] = set()
        if self.integer_results:
            return found
        for node in reversed(self.gm.graph.nodes):
            users = [user for user in node.users if not _asks(user)]
            if users and all(
                user.op == "output" or self._is_in_tail(user, found) for user in users
            ):
                found.add(node)
        return found

    def _is_in_tail(self, user: fx.Node, tail: set[fx.Node]) -> bool:
        info = op_info.info_of(user)
        return user in tail and not (info is not None and self._computes(user, info))

    def _in_float(self, node: fx.Node, user: fx.Node, ends: dict[fx.Node, str]) -> str:
        if user.op == "output":
            return "" if self.integer_results else LEAVES
        if user.target is operator.getitem:
            return ends.get(user, "")
        info = op_info.info_of(user)
        if info is None:
            return _only(op_info.op_names(user)[0]) if str(user.target).startswith(_ATEN) else ""
        norm = norm_reading(node, user, info)
        if norm:
            return _only(norm)
        if self.is_product(user, info):
            return "" if self._computes(user, info) else _only(info.names[0])
        if self._hands_on(user, info) or info.dropout:
            return ends.get(user, "")
        if info.scales not in (Scales.COMPUTE, Scales.SHARE):
            return _only(info.names[0])
        constant = info.both_data and sum(x in self.data for x in operands(user)) < 2
        if user in self.scores or user in self.lone or constant:
            return _only(info.names[0])
        return ends.get(user, "")


def lacking(info: OpInfo) -> str:
    """Why an op of which the target has kernels in float alone rounds nothing."""
    return f"the target has no kernel of {info.names[0]} with integers"


def _only(name: str) -> str:
    return f"only {name} reads it, which computes in float"


def _asks(node: fx.Node) -> bool:
    info = op_info.info_of(node)
    return info is not None and (info.shape_query or info.check is not None)
