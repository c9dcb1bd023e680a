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
    packed = edit.constant(f"{base}_indices", pack(codes, n_bits), like=node)
    extra = (axis,) if length > 1 else ()
    scaling = _dequantize_behind(node) if lut.dtype in _STORAGE else None
    if scaling is None:
        table = edit.constant(f"{base}_lut", lut, like=node)
        dense = edit.call(
            _ops.lut_to_dense.default, packed, table, n_bits, shape, *extra, like=node
        )
        edit.replace(node, dense)
    else:
        dense = _raise_quantized(edit, scaling, base, packed, lut, n_bits, shape, extra)
        edit.replace(scaling, dense)
        edit.erase(node)
    for old in (indices_node, lut_node):
        edit.drop(old)


def _raise_quantized(
    edit: Editor,
    scaling: fx.Node,
    base: str,
    packed: fx.Node,
    lut: Tensor,
    n_bits: int,
    shape: list[int],
    extra: tuple[int, ...],
) -> fx.Node:
    scale_node, zero_node = scaling.args[1], scaling.args[2] if len(scaling.args) > 2 else None
    assert isinstance(scale_node, fx.Node)
    scale = edit.value(scale_node)
    zero = edit.value(zero_node) if isinstance(zero_node, fx.Node) else None
    tables = list(lut.shape[:-2])
    on_table = list(scale.shape) == tables
    table_shape = [*tables, 1, 1]
    if zero is not None and not on_table and not bool((zero == zero.flatten()[0]).all()):
        # integers of a width without a type of its own: the scales stay behind the lookup
        return _raise_integers(edit, scaling, base, packed, lut, n_bits, shape, extra)
    if on_table:
        table_scale = scale.reshape(table_shape)
        offset = None if zero is None else zero.reshape(table_shape)
    else:
        table_scale = torch.ones(table_shape, dtype=scale.dtype)
        offset = None if zero is None else zero.flatten()[0].expand(table_shape).contiguous()
    if offset is not None and not offset.any():
        offset = None
    data = edit.constant(
        f"{base}_lut", lut.contiguous().reshape(-1).view(torch.uint8), like=scaling
    )
    factors = edit.constant(f"{base}_lut_scale", table_scale.contiguous(), like=scaling)
    zeros = None
    if offset is not None:
        zeros = edit.constant(f"{base}_lut_offset", offset.contiguous(), like=scaling)
    table = edit.call(
        _ops.shift_scale.default,
        data,
        factors,
        zeros,
        _STORAGE[lut.dtype],
        list(lut.shape),
        scale.dtype,
        like=scaling,
    )
    dense = edit.call(_ops.lut_to_dense.default, packed, table, n_bits, shape, *extra, like=scaling)
    if not on_table:
        channel = edit.constant(f"{base}_channel_scale", scale.detach().clone(), like=scaling)
        dense = edit.call(
            _ops.shift_scale.default,
            dense,
            channel,
            None,
            "float",
            shape,
            scale.dtype,
            like=scaling,
        )
    for old in (scale_node, zero_node):
        if isinstance(old, fx.Node) and set(old.users) == {scaling}:
            scaling.replace_input_with(old, dense)
            edit.drop(old)
    return dense


def _raise_integers(
    edit: Editor,
    scaling: fx.Node,
    base: str,
    packed: fx.Node,
    lut: Tensor,
    n_bits: int,
    shape: list[int],
    extra: tuple[int, ...],
) -> fx.Node:
    scale_node, zero_node = scaling.args[1], scaling.args[2]
    assert isinstance(scale_node, fx.Node)
    assert isinstance(zero_node, fx.Node)
    table = edit.constant(f"{base}_lut", lut.contiguous(), like=scaling)
    whole = edit.call(_ops.lut_to_dense.default, packed, table, n_bits, shape, *extra, like=scaling)
    scale = edit.constant(f"{base}_factor", edit.value(scale_node).clone(), like=scaling)
    zero = edit.constant(f"{base}_zeros", edit.value(zero_node).clone(), like=scaling)
    dense = edit.call(
        _ops.shift_scale.default,
        whole,
        scale,
        zero,
        "float",
        shape,
        scaling.meta["val"].dtype,
        like=scaling,
    )
    for old in (scale_node, zero_node):
        if set(old.users) == {scaling}:
            scaling.replace_input_with(old, dense)
            edit.drop(old)
    return dense


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
    value = node.meta["val"]
    scaled = edit.call(
        _ops.shift_scale.default,
        dense,
        scale,
        None,
        "float",
        list(dense.meta["val"].shape),
        value.dtype,
        like=node,
    )
    edit.replace(node, scaled)


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
