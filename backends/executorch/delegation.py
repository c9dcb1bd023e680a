"""What of a lowered program a delegate took."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

__all__ = ["Delegation", "delegation_of"]


@dataclass(frozen=True)
class Delegation:
    """Which ops the delegate computes and which are left to portable kernels.

    Attributes:
        delegates: Number of delegates.
        inside: Op → how often it is in a delegate.
        outside: Op → how often it is in none.
        notes: Weights that are not stored as asked, and why.
    """

    delegates: int
    inside: dict[str, int]
    outside: dict[str, int]
    notes: tuple[str, ...] = ()


def delegation_of(edge: Any, notes: tuple[str, ...]) -> Delegation:
    """What the delegates of a program in ExecuTorch's edge dialect compute.

    Args:
        edge: What `to_edge_transform_and_lower` gave.
        notes: Weights that are not stored as asked.
    """
    gm = edge.exported_program().graph_module
    inside: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    delegates = 0
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            held: Any = getattr(gm, str(node.target), None)
            if type(held).__name__ != "LoweredBackendModule":
                continue
            delegates += 1
            for op in held.original_module.graph.nodes:
                if op.op == "call_function" and op.target is not operator.getitem:
                    inside[_op_name(op)] += 1
        elif (
            node.op == "call_function"
            and node.target is not operator.getitem
            and "executorch_call_delegate" not in str(node.target)
        ):
            outside[_op_name(node)] += 1
    return Delegation(delegates, dict(inside), dict(outside), notes)


def _op_name(node: Any) -> str:
    return str(getattr(node.target, "__name__", node.target))
