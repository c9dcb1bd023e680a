"""Turn lookups of 8-bit integer tables into the integers that they look up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.analysis.stored_values import find_lookups
from graphopt.ir.editor import Editor, operands
from graphopt.passes.expand_tables import drop_unread
from graphopt.passes.pass_base import Pass

__all__ = ["TablesToIntegers"]

_ops = torch.ops.graphopt
_CONTAINERS = {"int8": torch.int8, "uint8": torch.uint8}


@dataclass(frozen=True)
class TablesToIntegers(Pass):
    """Expand each lookup of an (u)int8 table to (u)int8 weights with the table's scale, exactly.

    Before:
        %lut = graphopt.shift_scale(%lut_int8, %lut_scale, None, "int8", …)
        %w = graphopt.lut_to_dense(%indices, %lut, 4, shape)

    After:
        %w = graphopt.shift_scale(%w_quantized, %scale, None, "int8", shape, …)

    Targets that compute with integers and have no tables take these as quantized weights. Scales of
    tables along one axis become scales per channel, those of a grid of tables scales per block; a
    scale per channel behind the lookup is multiplied in. Lookups of float tables, and those with
    outliers, stay.

    Attributes:
        wanted: (weight, op that reads it) → whether that op gains by integers; lookups with another
            reader stay. None takes all.

    Examples:
        >>> spec = {"n_bits": 4, "lut_qspec": {"dtype": "int8"}}
        >>> config = {"palettization": {"global_config": {"op_state_spec": {"weight": spec}}}}
        >>> gm = graphopt.compress(model, example, config).graph_module
        >>> TablesToIntegers()(gm).modified
        True
    """

    name: ClassVar[str] = "tables-to-integers"
    wanted: Callable[[fx.Node, fx.Node], bool] | None = None

    @override
    def run(self, edit: Editor) -> None:
        for lookup in find_lookups(edit.gm):
            node = lookup.dense
            if self.wanted is not None and not all(self.wanted(node, user) for user in node.users):
                continue
            channel: Tensor | None = None
            inner = node
            if inner.target is _ops.shift_scale.default:
                scale = inner.args[1]
                channel = edit.value(scale)  # type: ignore[arg-type]
                inner = inner.args[0]  # type: ignore[assignment]
            table = inner.args[1] if inner.target is _ops.lut_to_dense.default else None
            if not isinstance(table, fx.Node) or table.target is not _ops.shift_scale.default:
                continue
            if str(table.args[3]) in _CONTAINERS:
                _expand(edit, lookup.name, node, inner, table, channel)


def _expand(
    edit: Editor, name: str, node: fx.Node, lookup: fx.Node, table: fx.Node, channel: Tensor | None
) -> None:
    indices = edit.value(lookup.args[0])  # type: ignore[arg-type]
    data_node, scale_node, offset_node, storage, lut_shape, out = table.args
    kind = _CONTAINERS[str(storage)]
    entries = edit.value(data_node).view(kind).reshape(list(lut_shape))  # type: ignore[arg-type]
    shape = list(lookup.args[3])  # type: ignore[arg-type]
    stored = _ops.lut_to_dense.default(indices, entries, lookup.args[2], shape, *lookup.args[4:])
    scale = edit.value(scale_node).squeeze(-1).squeeze(-1)  # type: ignore[arg-type]
    if channel is not None:
        counts = [max(pair) for pair in zip(scale.shape, channel.shape, strict=True)]
        scale = _spread(scale, counts) * _spread(channel, counts)
    several = [axis for axis, count in enumerate(scale.shape) if count > 1]
    if len(several) == 1:
        # a scale per channel is what integer targets know, a scale per group is not
        counts = [shape[axis] if axis in several else 1 for axis in range(len(shape))]
        scale = _spread(scale, counts)
    factors = edit.constant(f"{name}_scale", scale.contiguous(), like=node)
    zeros = None
    if isinstance(offset_node, fx.Node):
        offset = _spread(edit.value(offset_node).squeeze(-1).squeeze(-1), list(scale.shape))
        zeros = edit.constant(f"{name}_offset", offset.contiguous(), like=node)
    packed = stored.contiguous().view(torch.uint8).reshape(-1)
    data = edit.constant(f"{name}_quantized", packed, like=node)
    made = edit.call(
        _ops.shift_scale.default, data, factors, zeros, str(storage), shape, out, like=node
    )
    read = operands(node)
    edit.replace(node, made)
    drop_unread(edit, read)


def _spread(values: Tensor, counts: list[int]) -> Tensor:
    """Values of coarser blocks for finer ones."""
    for axis, count in enumerate(counts):
        if values.shape[axis] != count:
            values = values.repeat_interleave(count // values.shape[axis], axis)
    return values
