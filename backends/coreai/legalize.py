"""Turn our lookup ops into Core AI's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.backends.quiet import quiet
from graphopt.extras import require
from graphopt.ir.editor import Editor
from graphopt.ir.packed_codes import unpacked
from graphopt.numerics.packing import unpack
from graphopt.passes.pass_base import Pass

__all__ = ["LegalizeForCoreAI"]

_ops = torch.ops.graphopt
_DTYPES = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class LegalizeForCoreAI(Pass):
    """Unpack indices, pad tables to a width that Core AI stores, move scales behind the lookup.

    Before:
        %lut = graphopt.shift_scale(%lut_int8, %lut_scale, None, "int8", …)
        %w = graphopt.lut_to_dense(%packed, %lut, 3, shape)

    After:
        %d = coreai.lut_to_dense(%indices, %lut_int8, axis)
        %w = coreai.constexpr_blockwise_shift_scale(%d, %scale, …)

    coreai-torch finds the operands of a lookup by looking for "indices" and "lut" in their names.
    The names that `PalettizeWeights` gives hold these, and a module path that holds one of them too
    ("convo-lut-ion") is spelled differently in the buffers' names ("convolu_tion").
    """

    name: ClassVar[str] = "legalize-for-coreai"

    @override
    def run(self, edit: Editor) -> None:
        with quiet("coreai_torch"):
            require("coreai_torch", "coreai")
        for lookup in edit.calls(_ops.lut_to_dense.default):
            _legalize(edit, lookup)
        _drop_scales(edit)
        for sparse in edit.calls(_ops.sparse_to_dense.default):
            _legalize_sparse(edit, sparse)


def _legalize(edit: Editor, lookup: fx.Node) -> None:
    from coreai_torch._compression import custom_layers  # noqa: F401 - registers coreai::*

    indices, lut = lookup.args[0], lookup.args[1]
    assert isinstance(indices, fx.Node)
    assert isinstance(lut, fx.Node)
    n_bits, shape = lookup.args[2], lookup.args[3]
    assert isinstance(n_bits, int)
    assert isinstance(shape, list | tuple)
    axis = lookup.args[4] if len(lookup.args) > 4 else 0
    scaling = lut if lut.target is _ops.shift_scale.default else None
    table_node = lut if scaling is None else scaling.args[0]
    assert isinstance(table_node, fx.Node)
    table = edit.value(table_node)
    if scaling is not None:
        table = table.view(_DTYPES[str(scaling.args[3])]).reshape(list(scaling.args[4]))  # type: ignore[arg-type]
    length = int(table.shape[-1])
    index_shape = [
        int(size) // length if i == axis and length > 1 else int(size)
        for i, size in enumerate(shape)
    ]
    codes = unpacked(edit.value(indices), n_bits, tuple(index_shape))
    indices = _restate(edit, indices, codes, "_indices")
    table_node = _restate(edit, table_node, _padded(table, n_bits), "_lut")
    coreai: Any = torch.ops.coreai
    dense = edit.call(coreai.lut_to_dense.default, indices, table_node, axis, like=lookup)
    last = lookup
    channel = next((user for user in lookup.users if user.target is _ops.shift_scale.default), None)
    scale, zero = _behind_lookup(edit, scaling, channel)
    if scale is not None:
        owner = str(table_node.target).removesuffix("_lut")
        scale_node = edit.constant(f"{owner}_scale", scale, like=lookup)
        zero_node = None
        if zero is not None:
            zero_node = edit.constant(f"{owner}_zero_point", zero, like=lookup)
        dense = edit.call(
            coreai.constexpr_blockwise_shift_scale.default,
            dense,
            scale_node,
            zero_node,
            None,
            None,
            scale.dtype if table.dtype.is_floating_point else None,
            like=lookup,
        )
        last = channel or lookup
    edit.replace(last, dense)
    for node in (lookup if last is not lookup else None, scaling):
        if node is not None and not node.users:
            edit.erase(node)


def _legalize_sparse(edit: Editor, node: fx.Node) -> None:
    values, packed, shape = node.args
    assert isinstance(packed, fx.Node)
    assert isinstance(shape, list | tuple)
    sizes = [int(size) for size in shape]  # type: ignore[arg-type]
    mask = unpack(edit.value(packed), 1, math.prod(sizes)).reshape(sizes).bool()
    edit.set_value(packed, mask)
    packed.meta["val"] = edit.fake(mask)
    coreai: Any = torch.ops.coreai
    edit.replace(node, edit.call(coreai.sparse_to_dense.default, values, packed, like=node))


def _behind_lookup(
    edit: Editor, scaling: fx.Node | None, channel: fx.Node | None
) -> tuple[Tensor | None, Tensor | None]:
    """One scale (and zero point) on the dense weight for those of the table and the channels."""
    scale = zero = None
    if scaling is not None:
        scale = edit.value(scaling.args[1])[..., 0, 0]  # type: ignore[arg-type]
        if isinstance(scaling.args[2], fx.Node):
            zero = edit.value(scaling.args[2])[..., 0, 0].contiguous()
    if channel is not None:
        factors = edit.value(channel.args[1])  # type: ignore[arg-type]
        if scale is None:
            return factors.clone(), _own_offset(edit, channel)
        shape = [math.lcm(a, b) for a, b in zip(scale.shape, factors.shape, strict=True)]
        zero = None if zero is None else _spread(zero, shape)
        scale = _spread(scale, shape) * _spread(factors, shape)
    return (None if scale is None else scale.contiguous()), zero


def _own_offset(edit: Editor, channel: fx.Node) -> Tensor | None:
    """Zero points on the dense weight, which integers that became tables have."""
    node = channel.args[2]
    return edit.value(node).clone() if isinstance(node, fx.Node) else None


def _spread(blocks: Tensor, shape: list[int]) -> Tensor:
    for axis, size in enumerate(shape):
        blocks = blocks.repeat_interleave(size // blocks.shape[axis], dim=axis)
    return blocks.contiguous()


def _padded(table: Tensor, n_bits: int) -> Tensor:
    """3-bit tables as 4-bit ones whose upper entries repeat the last."""
    if n_bits != 3:
        return table.contiguous()
    raw = table.view(torch.uint8) if table.dtype.itemsize == 1 else table
    last = raw[..., -1:, :].expand(*raw.shape[:-2], 8, raw.shape[-1])
    return torch.cat([raw, last], dim=-2).view(table.dtype).contiguous()


def _restate(edit: Editor, node: fx.Node, value: Tensor, suffix: str) -> fx.Node:
    """Give a constant another value, under a name in which coreai-torch cannot go wrong."""
    path = str(node.target)
    safe = path.removesuffix(suffix).replace("lut", "lu_t").replace("indices", "indi_ces") + suffix
    if safe == path:
        edit.set_value(node, value)
        node.meta["val"] = edit.fake(value)
        return node
    renamed = edit.constant(safe, value, like=node)
    edit.replace(node, renamed)
    edit.delete_constant(path)
    return renamed


def _drop_scales(edit: Editor) -> None:
    for node in edit.constants():
        path = str(node.target)
        if not node.users and path.endswith(("_lut_scale", "_lut_offset", "_channel_scale")):
            edit.erase(node)
            edit.delete_constant(path)
