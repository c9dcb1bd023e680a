"""Rounded activations: pairs of `QuantizeLinear` and `DequantizeLinear` with the exact scales."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.backends.onnx.emitter import Emitter, array_of
from graphopt.errors import LoweringError

__all__ = ["expand_dequantize", "expand_quantize", "expand_round", "is_shiftable"]

_FP8 = {"fp8_e4m3": "FLOAT8E4M3FN", "fp8_e5m2": "FLOAT8E5M2"}
_FULL = {"INT8": (-128, 127), "UINT8": (0, 255)}
_SHIFT = 128  # from int8 to uint8


def expand_quantize(emit: Emitter, node: Any, unsigned: bool) -> Any:
    """`QuantizeLinear`, behind a `Clip` where the range is narrower than its type's.

    Args:
        emit: At the node.
        node: `quantize(x)` with one scale, or `quantize(x, scales, zeros)`.
        unsigned: Give int8 as uint8, every value 128 higher, if only such nodes read it.
    """
    (result,) = node.outputs
    kind = result.dtype.name
    x = _as_float(emit, node.inputs[0])
    scale, zero = _scale_and_zero(node)
    low, high = node.attributes["low"].as_int(), node.attributes["high"].as_int()
    if (low, high) != _FULL.get(kind):
        if scale.ndim:
            raise LoweringError(
                f"{result.name}: activations are rounded to {low} … {high} with a scale per channel,"
                " which no op of ONNX does; use one scale, or the whole range of the type"
            )
        ends = [(end - float(zero)) * float(scale) for end in (low, high)]
        bounds = [emit.constant(np.array(end, np.float32), "bound") for end in ends]
        x = emit.call("Clip", [x, *bounds], x)
    if unsigned and kind == "INT8":
        kind, zero = "UINT8", zero + _SHIFT
    return emit.call(
        "QuantizeLinear", [x, *_operands(emit, scale, zero, kind)], result, kind=kind, **_axis(node)
    )


def expand_dequantize(emit: Emitter, node: Any) -> Any:
    """`DequantizeLinear` of what a `QuantizeLinear` gave, in the type that it has.

    Args:
        emit: At the node.
        node: `dequantize(codes)` with one scale, or `dequantize(codes, scales, zeros)`.
    """
    (result,) = node.outputs
    codes = node.inputs[0]
    kind = codes.dtype.name
    scale, zero = _scale_and_zero(node)
    shifted = kind == "UINT8" and node.attributes["low"].as_int() < 0
    zero = zero + _SHIFT if shifted else zero
    operands = _operands(emit, scale, zero, kind)
    made = emit.call("DequantizeLinear", [codes, *operands], result, kind="FLOAT", **_axis(node))
    return _as_given(emit, made, result)


def expand_round(emit: Emitter, node: Any) -> Any:
    """A narrow float type and back, by casts.

    ONNX Runtime takes a `Relu` before a `QuantizeLinear` with zero point 0 for one that rounding
    does anyway, in float types, too.

    Args:
        emit: At the node.
        node: `round_to_float(x)`.
    """
    import onnx_ir as ir

    (result,) = node.outputs
    kind = _FP8[node.attributes["storage"].as_string()]
    step = node.attributes["scale"].as_float()
    x = _as_float(emit, node.inputs[0])
    inverse = emit.constant(np.array(1.0 / step, np.float32), "act_inverse")
    scaled = emit.call("Mul", [x, inverse], result, kind="FLOAT")
    narrow = emit.call("Cast", [scaled], result, kind=kind, to=ir.DataType[kind], saturate=1)
    wide = emit.call("Cast", [narrow], result, kind="FLOAT", to=ir.DataType.FLOAT)
    scale = emit.constant(np.array(step, np.float32), "act_scale")
    made = emit.call("Mul", [wide, scale], result, kind="FLOAT")
    return _as_given(emit, made, result)


def is_shiftable(node: Any) -> bool:
    """Whether only our own nodes read what a `quantize` gives."""
    (result,) = node.outputs
    readers = [use.node for use in result.uses()]
    ours = all(r.domain == node.domain and r.op_type == "dequantize" for r in readers)
    return ours and not result.is_graph_output()


def _scale_and_zero(node: Any) -> tuple[Any, Any]:
    if "scale" in node.attributes:
        scale = np.array(node.attributes["scale"].as_float(), np.float32)
        return scale, np.array(node.attributes["zero"].as_int(), np.int64)
    scale = array_of(node.inputs[1]).astype(np.float32).reshape(-1)
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return scale, np.zeros(scale.shape, np.int64)
    return scale, array_of(node.inputs[2]).astype(np.int64).reshape(-1)


def _operands(emit: Emitter, scale: Any, zero: Any, kind: str) -> list[Any]:
    container = np.uint8 if kind == "UINT8" else np.int8
    factor = emit.constant(scale, "act_scale")
    return [factor, emit.constant(np.asarray(zero).astype(container), "act_zero", kind)]


def _axis(node: Any) -> dict[str, Any]:
    axis = node.attributes.get("axis")
    return {} if axis is None else {"axis": axis.as_int()}


def _as_float(emit: Emitter, x: Any) -> Any:
    import onnx_ir as ir

    if x.dtype == ir.DataType.FLOAT:
        return x
    return emit.call("Cast", [x], x, kind="FLOAT", to=ir.DataType.FLOAT)


def _as_given(emit: Emitter, value: Any, result: Any) -> Any:
    if value.dtype == result.dtype:
        return value
    return emit.call("Cast", [value], result, to=result.dtype)
