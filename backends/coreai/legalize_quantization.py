"""Turn quantize and dequantize ops into Core AI's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.analysis.stored_values import QuantizedTensor, find_quantized_weights
from graphopt.backends.quiet import quiet
from graphopt.extras import require
from graphopt.ir.editor import Editor
from graphopt.ir.ops import STORAGE_BITS
from graphopt.numerics.packing import unpack
from graphopt.passes.pass_base import Pass

__all__ = ["LegalizeQuantizationForCoreAI"]

_ours = torch.ops.graphopt
_FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_Scales = tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class LegalizeQuantizationForCoreAI(Pass):
    """Rewrite rounded activations and dequantized weights.

    Before:
        %q = quantized_decomposed.quantize_per_tensor(%x, 0.1, 0, -128, 127, int8)
        %w = quantized_decomposed.dequantize_per_channel(%data, %scale, %zero, 0, …)

    After:
        %q = coreai.quantize(%x, %scale, int8, %zero_point)
        %w = coreai.constexpr_blockwise_shift_scale(%data, %scale, %zero_point, None, int8, float32)
    """

    name: ClassVar[str] = "legalize-quantization-for-coreai"

    @override
    def run(self, edit: Editor) -> None:
        with quiet("coreai_torch"):
            require("coreai_torch", "coreai")
        from coreai_torch._compression import custom_layers  # noqa: F401 - registers coreai::*

        for weight in find_quantized_weights(edit.gm):
            _weight(edit, weight)
        known: dict[tuple[Any, ...], _Scales] = {}
        for node in list(edit.gm.graph.nodes):
            target = str(node.target)
            if target.startswith("quantized_decomposed.quantize_per_"):
                _quantize(edit, node, known)
            elif target.startswith("quantized_decomposed.dequantize_per_"):
                _dequantize(edit, node, known)
            elif node.target is _ours.round_to_float.default:
                _round(edit, node)


def _weight(edit: Editor, weight: QuantizedTensor) -> None:
    coreai: Any = torch.ops.coreai
    node, data = weight.node, weight.data
    stored = edit.value(data)
    shape, storage = list(weight.shape), weight.storage
    scale, zero, minimum, dtype = _weight_scales(edit, weight)
    kind: torch.dtype | None = None
    if storage in _FP8:
        stored = stored.view(_FP8[storage]).reshape(shape)
    elif storage == "fp4_e2m1":
        stored = stored.reshape([*shape[:-1], shape[-1] // 2])
    elif stored.ndim != len(shape) or stored.dtype == torch.uint8:
        stored = _integers(stored, storage, shape)
        kind = getattr(torch, storage)
    else:
        kind = stored.dtype
    floats = storage in _FP8 or storage == "fp4_e2m1"
    values = edit.constant(f"{weight.name}_data", stored.clone(), like=node)
    factors = edit.constant(f"{weight.name}_factor", scale, like=node)
    zeros = lows = None
    if minimum is not None:
        lows = edit.constant(f"{weight.name}_minval", minimum, like=node)
    elif not floats:
        container = torch.uint8 if storage.startswith("u") else torch.int8
        zero = torch.zeros(scale.shape) if zero is None else zero
        zeros = edit.constant(f"{weight.name}_zeros", zero.to(container), like=node)
    dense = edit.call(
        coreai.constexpr_blockwise_shift_scale.default,
        values,
        factors,
        zeros,
        lows,
        kind,
        dtype if floats else None,
        like=node,
    )
    readers = [operand for operand in node.args if isinstance(operand, fx.Node)]
    edit.replace(node, _as_type(edit, dense, node.meta["val"].dtype, node))
    for operand in readers:
        edit.drop(operand)


def _integers(stored: Tensor, storage: str, shape: list[int]) -> Tensor:
    bits = STORAGE_BITS[storage]
    codes = unpack(stored.reshape(-1), bits, math.prod(shape)).reshape(shape)
    if storage.startswith("u"):
        return codes
    signed = codes.to(torch.int16)
    return torch.where(signed >= 2 ** (bits - 1), signed - 2**bits, signed).to(torch.int8)


def _weight_scales(
    edit: Editor, weight: QuantizedTensor
) -> tuple[Tensor, Tensor | None, Tensor | None, torch.dtype]:
    """Scale, zero point and minimum with the weight's rank, and the dense type."""
    node, rank = weight.node, len(weight.shape)
    dtype = node.meta["val"].dtype
    if node.target is _ours.shift_scale.default:
        scale = edit.value(node.args[1]).clone()  # type: ignore[arg-type]
        offset = None if node.args[2] is None else edit.value(node.args[2])  # type: ignore[arg-type]
        if weight.offset != "minimum":
            return scale, offset, None, dtype
        assert offset is not None
        bits = STORAGE_BITS[weight.storage]
        lowest = 0 if weight.storage.startswith("u") else -(2 ** (bits - 1))
        wide = scale.to(torch.float32)
        return scale, None, (wide * (lowest - offset)).to(scale.dtype), dtype
    if "per_channel" in str(node.target):
        counts = weight.counts
        scale = edit.value(node.args[1]).reshape(counts).clone()  # type: ignore[arg-type]
        zero = edit.value(node.args[2]).reshape(counts)  # type: ignore[arg-type]
        return scale, zero, None, dtype
    scale = torch.full([1] * rank, float(node.args[1]))  # type: ignore[arg-type]
    return scale, torch.full([1] * rank, int(node.args[2])), None, dtype  # type: ignore[arg-type]


def _scales(edit: Editor, node: fx.Node, known: dict[tuple[Any, ...], _Scales]) -> _Scales:
    """Scale and zero point of an activation as constants, one pair for all ops that have the same."""
    container = node.args[-1]
    assert isinstance(container, torch.dtype)
    scale, zero = node.args[1], node.args[2]
    key = (scale, zero, container)
    if key not in known:
        first = next(
            candidate for candidate in edit.gm.graph.nodes if candidate.op != "placeholder"
        )
        if isinstance(scale, fx.Node) and isinstance(zero, fx.Node):
            factor, offset = edit.value(scale), edit.value(zero).to(container)
        else:
            factor = torch.tensor(float(scale))  # type: ignore[arg-type]
            offset = torch.tensor(int(zero), dtype=container)  # type: ignore[arg-type]
        source = node.args[0]
        name = source.name if isinstance(source, fx.Node) else node.name
        known[key] = (
            edit.constant(f"{name}_act_scale", factor.clone(), like=node, before=first),
            edit.constant(f"{name}_act_zero", offset.clone(), like=node, before=first),
        )
    return known[key]


def _quantize(edit: Editor, node: fx.Node, known: dict[tuple[Any, ...], _Scales]) -> None:
    coreai: Any = torch.ops.coreai
    scale, zero = _scales(edit, node, known)
    axis = (node.args[3],) if "per_channel" in str(node.target) else ()
    extra = (None, *axis) if axis else ()
    # Core AI wants the scale's type; in 16 bits a scale would lose digits or vanish
    x = _as_type(edit, node.args[0], scale.meta["val"].dtype, node)
    quantized = edit.call(coreai.quantize.default, x, scale, node.args[-1], zero, *extra, like=node)
    edit.replace(node, quantized)


def _dequantize(edit: Editor, node: fx.Node, known: dict[tuple[Any, ...], _Scales]) -> None:
    coreai: Any = torch.ops.coreai
    scale, zero = _scales(edit, node, known)
    axis = node.args[3] if "per_channel" in str(node.target) else 0
    dense = edit.call(
        coreai.dequantize.default,
        node.args[0],
        scale,
        zero,
        None,
        axis,
        node.args[-1],
        scale.meta["val"].dtype,
        like=node,
    )
    edit.replace(node, _as_type(edit, dense, node.meta["val"].dtype, node))


def _round(edit: Editor, node: fx.Node) -> None:
    coreai: Any = torch.ops.coreai
    x, scale, storage = node.args
    assert isinstance(x, fx.Node)
    kind = _FP8[str(storage)]
    factor = edit.constant(f"{x.name}_act_scale", torch.tensor(float(scale)), like=node)  # type: ignore[arg-type]
    wide = _as_type(edit, x, torch.float32, node)
    stored = edit.call(coreai.quantize.default, wide, factor, kind, like=node)
    dense = edit.call(
        coreai.dequantize.default,
        stored,
        factor,
        None,
        None,
        0,
        kind,
        torch.float32,
        like=node,
    )
    edit.replace(node, _as_type(edit, dense, node.meta["val"].dtype, node))


def _as_type(edit: Editor, value: Any, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    """The value in a type, by a cast where it has another."""
    assert isinstance(value, fx.Node)
    if value.meta["val"].dtype is dtype:
        return value
    return edit.call(torch.ops.aten._to_copy.default, value, dtype=dtype, like=like)
