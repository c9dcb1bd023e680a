"""Raise the quantize and dequantize ops of Core AI back to the neutral ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.quantized import quantized_ops
from graphopt.errors import LoweringError
from graphopt.ir.editor import Editor
from graphopt.numerics.packing import pack
from graphopt.specs.dtypes import bits_of, dtype_name

__all__ = ["raise_activation", "raise_weight"]

_ours = torch.ops.graphopt
_FP8 = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}


def _argument(node: fx.Node, place: int) -> Any:
    return node.args[place] if len(node.args) > place else None


def raise_weight(edit: Editor, node: fx.Node) -> None:
    """Turn one `coreai.constexpr_blockwise_shift_scale` of a constant into neutral form."""
    data = node.args[0]
    if not isinstance(data, fx.Node) or data.op != "get_attr":
        raise LoweringError(
            f"{node.name}: a dequantized weight of Core AI form that is no constant cannot be raised;"
            " lower the module to Core AI, or start from the original model"
        )
    stored = edit.value(data)
    scale = edit.value(node.args[1])  # type: ignore[arg-type]
    zero_node, low_node = _argument(node, 2), _argument(node, 3)
    kind, out = _argument(node, 4), node.meta["val"].dtype
    name = str(data.target).removesuffix("_data").removesuffix("_quantized")
    shape = list(node.meta["val"].shape)
    zero = None if zero_node is None else edit.value(zero_node)
    if zero is not None and not bool(zero.to(torch.float32).any()):
        zero = None
    storage = _storage(stored, kind, scale)
    offset = zero
    if low_node is not None:
        bits = bits_of(getattr(torch, storage))
        lowest = 0 if storage.startswith("u") else -(2 ** (bits - 1))
        wide = edit.value(low_node).to(torch.float32) / scale.to(torch.float32)
        offset = lowest - wide
    dense = _plain(edit, node, name, stored, scale, zero, storage)
    if dense is None or low_node is not None:
        packed = edit.constant(f"{name}_quantized", _packed(stored, storage), like=node)
        factors = edit.constant(f"{name}_scale", scale.detach().clone(), like=node)
        zeros = None
        if offset is not None:
            zeros = edit.constant(f"{name}_offset", offset.detach().clone(), like=node)
        dense = edit.call(
            _ours.shift_scale.default, packed, factors, zeros, storage, shape, out, like=node
        )
    operands = [operand for operand in node.args if isinstance(operand, fx.Node)]
    edit.replace(node, dense)
    for operand in operands:
        edit.drop(operand)


def _storage(stored: Tensor, kind: torch.dtype | None, scale: Tensor) -> str:
    if stored.dtype in _FP8:
        return _FP8[stored.dtype]
    if kind is None and stored.dtype == torch.uint8 and dtype_name(scale.dtype) == "float8_e8m0fnu":
        return "fp4_e2m1"
    return dtype_name(kind or stored.dtype)


def _plain(
    edit: Editor,
    node: fx.Node,
    name: str,
    stored: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    storage: str,
) -> fx.Node | None:
    """The form of the ecosystem's own ops, for 8-bit integers with scales along one axis."""
    axes = [axis for axis, count in enumerate(scale.shape) if count > 1]
    fits = not axes or (len(axes) == 1 and scale.shape[axes[0]] == stored.shape[axes[0]])
    if storage not in ("int8", "uint8") or node.meta["val"].dtype != torch.float32 or not fits:
        return None
    if scale.dtype != torch.float32 or _argument(node, 3) is not None:
        return None
    ops = quantized_ops()
    limits = (-128, 127, torch.int8) if storage == "int8" else (0, 255, torch.uint8)
    data = edit.constant(f"{name}_quantized", stored.detach().clone(), like=node)
    if not axes:
        point = 0 if zero is None else int(zero.flatten()[0])
        step = float(scale.flatten()[0])
        return edit.call(ops.dequantize_per_tensor.default, data, step, point, *limits, like=node)
    points = torch.zeros(scale.numel(), dtype=torch.int64)
    if zero is not None:
        points = zero.reshape(-1).to(torch.int64)
    factors = edit.constant(f"{name}_scale", scale.detach().reshape(-1).clone(), like=node)
    zeros = edit.constant(f"{name}_zero_point", points, like=node)
    return edit.call(
        ops.dequantize_per_channel.default, data, factors, zeros, axes[0], *limits, like=node
    )


def _packed(stored: Tensor, storage: str) -> Tensor:
    if storage.startswith(("fp8", "fp4")):
        return stored.contiguous().view(torch.uint8).reshape(-1).clone()
    bits = bits_of(getattr(torch, storage))
    return pack((stored.to(torch.int16) & (2**bits - 1)).to(torch.uint8), bits)


def raise_activation(edit: Editor, node: fx.Node) -> None:
    """Turn one `coreai.quantize` or `coreai.dequantize` into neutral form."""
    quantizing = "dequantize" not in str(node.target)
    scale = edit.value(node.args[1])  # type: ignore[arg-type]
    zero_node = _argument(node, 3 if quantizing else 2)
    low_node = _argument(node, 4 if quantizing else 3)
    axis = _argument(node, 5 if quantizing else 4) or 0
    kind: Any = node.args[2] if quantizing else (_argument(node, 5) or _dtype_of(node.args[0]))
    if low_node is not None:
        raise LoweringError(
            f"{node.name}: an activation with a float minimum in Core AI form cannot be raised; lower"
            " the module to Core AI, or start from the original model"
        )
    if kind in _FP8:
        if not quantizing:
            return  # replaced together with its quantize op
        _raise_float(edit, node, float(scale), _FP8[kind])
        return
    ops = quantized_ops()
    limits = (-128, 127, torch.int8) if kind == torch.int8 else (0, 255, torch.uint8)
    if kind not in (torch.int8, torch.uint8):
        raise LoweringError(f"{node.name}: {kind} activations cannot be raised")
    zero = torch.zeros(scale.shape) if zero_node is None else edit.value(zero_node)
    verb = "quantize" if quantizing else "dequantize"
    out = (
        {}
        if quantizing or node.meta["val"].dtype == torch.float32
        else {"out_dtype": node.meta["val"].dtype}
    )
    if scale.numel() > 1:
        base = f"{node.name}_{verb}"
        factors = edit.constant(f"{base}_scale", scale.reshape(-1).clone(), like=node)
        points = edit.constant(f"{base}_zero_point", zero.reshape(-1).to(torch.int64), like=node)
        target = getattr(ops, f"{verb}_per_channel").default
        made = edit.call(target, node.args[0], factors, points, axis, *limits, like=node, **out)
    else:
        target = getattr(ops, f"{verb}_per_tensor").default
        step, point = float(scale), int(zero)
        made = edit.call(target, node.args[0], step, point, *limits, like=node, **out)
    operands = [operand for operand in node.args[1:] if isinstance(operand, fx.Node)]
    edit.replace(node, made)
    for operand in operands:
        edit.drop(operand)


def _raise_float(edit: Editor, node: fx.Node, scale: float, storage: str) -> None:
    readers = list(node.users)
    made = edit.call(_ours.round_to_float.default, node.args[0], scale, storage, like=node)
    for reader in readers:
        edit.replace(reader, made)
    edit.erase(node)


def _dtype_of(node: object) -> torch.dtype | None:
    return node.meta["val"].dtype if isinstance(node, fx.Node) else None
