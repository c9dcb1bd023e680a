"""Reading what a converted program holds: its lookups, for refusals, reports and sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.analysis.weights import is_with_outliers

__all__ = ["Lookup", "find_lookups", "find_sparse"]

_ops = torch.ops.graphopt


@dataclass(frozen=True)
class Lookup:
    """One palettized weight of a graph.

    Attributes:
        name: Name of the weight, from its indices' buffer.
        node: The lookup op.
        n_bits: Bits per index.
        shape: Shape of the dense weight.
        tables: Tables along each axis.
        entries: Length of a table entry.
        lut_dtype: Element type of the stored tables.
        channel_scale: Whether a scale follows the lookup.
        dense: The node that gives the dense weight: the lookup, its scale, or what adds outliers.
    """

    name: str
    node: fx.Node
    n_bits: int
    shape: tuple[int, ...]
    tables: tuple[int, ...]
    entries: int
    lut_dtype: str
    channel_scale: bool
    dense: fx.Node

    @property
    def outliers(self) -> bool:
        """Whether outliers are added."""
        return is_with_outliers(self.dense)

    @property
    def grouped(self) -> bool:
        """Whether there is more than one table."""
        return any(count > 1 for count in self.tables)


def find_lookups(gm: fx.GraphModule) -> list[Lookup]:
    """All lookups of a graph in our vocabulary, in order."""
    found = []
    for node in gm.graph.nodes:
        if node.target is not _ops.lut_to_dense.default:
            continue
        indices, lut = node.args[0], node.args[1]
        value = lut.meta.get("val")
        if not isinstance(value, Tensor):
            value = _tensor(gm, lut)
        quantized = lut.target is _ops.shift_scale.default
        dtype = str(lut.args[3]) if quantized else str(value.dtype).removeprefix("torch.")
        name = str(indices.target).removesuffix("_indices")
        dense, scaled = node, False
        if len(node.users) == 1 and next(iter(node.users)).target is _ops.shift_scale.default:
            dense, scaled = next(iter(node.users)), True
        if len(dense.users) == 1 and is_with_outliers(next(iter(dense.users))):
            dense = next(iter(dense.users))
        tables = tuple(int(size) for size in value.shape[:-2])
        shape = tuple(int(size) for size in node.args[3])
        found.append(
            Lookup(
                name, node, node.args[2], shape, tables, int(value.shape[-1]), dtype, scaled, dense
            )
        )
    return found


def find_sparse(gm: fx.GraphModule) -> list[fx.Node]:
    """The ops that put values into pruned weights, in order; outliers beside tables excepted."""
    return [
        node
        for node in gm.graph.nodes
        if node.target is _ops.sparse_to_dense.default
        and not any(is_with_outliers(user) and user.args[1] is node for user in node.users)
    ]


def _tensor(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    if node.op == "get_attr":
        value: object = gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value
    shape = [int(size) for size in node.args[4]]  # type: ignore[union-attr,arg-type]
    return torch.empty(shape, device="meta")
