"""Raise Core AI's lookup and dequantize ops back to our vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.backends.coreai.raise_quantization import raise_activation, raise_weight
from graphopt.ir.editor import Editor
from graphopt.ir.packed_codes import packed_of
from graphopt.numerics.packing import pack
from graphopt.passes.pass_base import Pass

__all__ = ["RaiseFromCoreAI"]

_ops = torch.ops.graphopt
_NARROW, _PADDED = 3, 4
_STORAGE = {
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e5m2: "fp8_e5m2",
}


@dataclass(frozen=True)
class RaiseFromCoreAI(Pass):
    """Turn Core AI's compression ops into ours, so that every backend can take the program.

    Before:
        %w = coreai.lut_to_dense(%indices, %lut, axis)

    After:
        %w = graphopt.lut_to_dense(%packed, %lut, n_bits, shape)

    A table that was padded for Core AI gets its own width back. A dequantize op behind the lookup
    of a narrow table becomes one in front of it where its scales allow, and a unit dequantize plus
    a scale on the dense weight where not.
    """

    name: ClassVar[str] = "raise-from-coreai"

    @override
    def run(self, edit: Editor) -> None:
        for node in list(edit.gm.graph.nodes):
            if str(node.target) == "coreai.lut_to_dense.default":
                _raise_lookup(edit, node)
        for node in list(edit.gm.graph.nodes):
            if str(node.target) != "coreai.constexpr_blockwise_shift_scale.default":
                continue
            if (
                isinstance(node.args[0], fx.Node)
                and node.args[0].target is _ops.lut_to_dense.default
            ):
                _raise_channel_scale(edit, node)
            else:
                raise_weight(edit, node)
        for node in list(edit.gm.graph.nodes):
            if str(node.target) == "coreai.sparse_to_dense.default":
                _raise_sparse(edit, node)
        for node in list(edit.gm.graph.nodes):
            if str(node.target) in ("coreai.quantize.default", "coreai.dequantize.default"):
                raise_activation(edit, node)


@dataclass(frozen=True)
class _Lookup:
    """A lookup in our form, without its table.

    Attributes:
        base: Name of the weight.
        packed: Its codes.
        lut: The table as Core AI holds it, without padding.
        n_bits: Width of a code.
        shape: Of the dense weight.
        vector_axis: The axis along which entries lie, () for entries of one element.
    """

    base: str
    packed: fx.Node
    lut: Tensor
    n_bits: int
    shape: list[int]
    vector_axis: tuple[int, ...]

    def dense(self, edit: Editor, table: fx.Node, like: fx.Node) -> fx.Node:
        """The dense weight that the codes pick from `table`, in the place of `like`."""
        described = (self.n_bits, self.shape, *self.vector_axis)
        return edit.call(_ops.lut_to_dense.default, self.packed, table, *described, like=like)


def _raise_lookup(edit: Editor, node: fx.Node) -> None:
    indices_node, lut_node, axis = node.args
    assert isinstance(indices_node, fx.Node)
    assert isinstance(lut_node, fx.Node)
    assert isinstance(axis, int)
    codes, lut = edit.value(indices_node), edit.value(lut_node)
    n_bits, lut = _unpadded(codes, lut)
    length = int(lut.shape[-1])
    shape = [size * length if i == axis else size for i, size in enumerate(codes.shape)]
    base = str(indices_node.target).removesuffix("_indices")
    packed = edit.constant(f"{base}_indices", packed_of(codes, n_bits), like=node)
    lookup = _Lookup(base, packed, lut, n_bits, shape, (axis,) if length > 1 else ())
    scaling = _dequantize_behind(node) if lut.dtype in _STORAGE else None
    if scaling is None:
        table = edit.constant(f"{base}_lut", lut, like=node)
        edit.replace(node, lookup.dense(edit, table, node))
    else:
        dense = _raise_quantized(edit, scaling, lookup)
        edit.replace(scaling, dense)
        edit.erase(node)
    for old in (indices_node, lut_node):
        edit.drop(old)


def _raise_quantized(edit: Editor, scaling: fx.Node, lookup: _Lookup) -> fx.Node:
    scale_node, zero_node = scaling.args[1], scaling.args[2] if len(scaling.args) > 2 else None
    assert isinstance(scale_node, fx.Node)
    scale = edit.value(scale_node)
    zero = edit.value(zero_node) if isinstance(zero_node, fx.Node) else None
    tables = list(lookup.lut.shape[:-2])
    on_table = list(scale.shape) == tables
    table_shape = [*tables, 1, 1]
    if zero is not None and not on_table and not bool((zero == zero.flatten()[0]).all()):
        # integers of a width without a type of its own: the scales stay behind the lookup
        return _raise_integers(edit, scaling, lookup)
    if on_table:
        table_scale = scale.reshape(table_shape)
        offset = None if zero is None else zero.reshape(table_shape)
    else:
        table_scale = torch.ones(table_shape, dtype=scale.dtype)
        offset = None if zero is None else zero.flatten()[0].expand(table_shape).contiguous()
    dense = lookup.dense(edit, _scaled_table(edit, scaling, lookup, table_scale, offset), scaling)
    if not on_table:
        name = f"{lookup.base}_channel_scale"
        channel = edit.constant(name, scale.detach().clone(), like=scaling)
        dense = _scaled(edit, scaling, (dense, channel, None), scale.dtype)
    _drop_operands(edit, scaling, dense)
    return dense


def _scaled_table(
    edit: Editor, scaling: fx.Node, lookup: _Lookup, scale: Tensor, offset: Tensor | None
) -> fx.Node:
    """The narrow table with its scales in front of the lookup."""
    lut, base = lookup.lut, lookup.base
    narrow = lut.contiguous().reshape(-1).view(torch.uint8)
    data = edit.constant(f"{base}_lut", narrow, like=scaling)
    factors = edit.constant(f"{base}_lut_scale", scale.contiguous(), like=scaling)
    zeros = None
    if offset is not None and offset.any():
        zeros = edit.constant(f"{base}_lut_offset", offset.contiguous(), like=scaling)
    described = (_STORAGE[lut.dtype], list(lut.shape), scale.dtype)
    return edit.call(_ops.shift_scale.default, data, factors, zeros, *described, like=scaling)


def _raise_integers(edit: Editor, scaling: fx.Node, lookup: _Lookup) -> fx.Node:
    scale_node, zero_node = scaling.args[1], scaling.args[2]
    assert isinstance(scale_node, fx.Node)
    assert isinstance(zero_node, fx.Node)
    base = lookup.base
    table = edit.constant(f"{base}_lut", lookup.lut.contiguous(), like=scaling)
    whole = lookup.dense(edit, table, scaling)
    scale = edit.constant(f"{base}_factor", edit.value(scale_node).clone(), like=scaling)
    zero = edit.constant(f"{base}_zeros", edit.value(zero_node).clone(), like=scaling)
    dense = _scaled(edit, scaling, (whole, scale, zero), scaling.meta["val"].dtype)
    _drop_operands(edit, scaling, dense)
    return dense


def _scaled(
    edit: Editor,
    node: fx.Node,
    operands: tuple[fx.Node, fx.Node, fx.Node | None],
    dtype: torch.dtype,
) -> fx.Node:
    """A dense weight times its scales, in the place of `node`; operands are weight, scale, offset."""
    shape = list(operands[0].meta["val"].shape)
    return edit.call(_ops.shift_scale.default, *operands, "float", shape, dtype, like=node)


def _drop_operands(edit: Editor, scaling: fx.Node, dense: fx.Node) -> None:
    """Drop scales and zero points that nothing else reads."""
    for old in scaling.args[1:3]:
        if isinstance(old, fx.Node) and set(old.users) == {scaling}:
            scaling.replace_input_with(old, dense)
            edit.drop(old)


def _raise_sparse(edit: Editor, node: fx.Node) -> None:
    values, mask_node = node.args
    assert isinstance(mask_node, fx.Node)
    mask = edit.value(mask_node)
    packed = pack(mask.to(torch.uint8), 1)
    edit.set_value(mask_node, packed)
    mask_node.meta["val"] = edit.fake(packed)
    shape = list(mask.shape)
    edit.replace(node, edit.call(_ops.sparse_to_dense.default, values, mask_node, shape, like=node))


def _raise_channel_scale(edit: Editor, node: fx.Node) -> None:
    dense, scale = node.args[0], node.args[1]
    assert isinstance(dense, fx.Node)
    assert isinstance(scale, fx.Node)
    edit.replace(node, _scaled(edit, node, (dense, scale, None), node.meta["val"].dtype))


def _dequantize_behind(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    if len(users) == 1 and str(users[0].target).startswith("coreai.constexpr_blockwise"):
        return users[0]
    return None


def _unpadded(codes: Tensor, lut: Tensor) -> tuple[int, Tensor]:
    """Width and tables as they were before 3-bit tables were padded to 4 bits."""
    stored = int(math.log2(lut.shape[-2]))
    if stored == _PADDED and codes.numel() and int(codes.max()) < 2**_NARROW:
        last = lut[..., 2**_NARROW - 1 : 2**_NARROW, :].float()
        if bool((lut[..., 2**_NARROW :, :].float() == last).all()):
            return _NARROW, lut[..., : 2**_NARROW, :].contiguous()
    return stored, lut
