"""Integers with scales: `DequantizeLinear` where it can hold the blocks, products of them elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.backends.onnx.emitter import Emitter, array_of
from graphopt.backends.onnx.tables import stored_codes
from graphopt.ir.ops import STORAGE_BITS

__all__ = ["Layout", "Reading", "elements_of", "expand_shift_scale", "layout_of"]

Array = NDArray[Any]
_FP8 = {"fp8_e4m3": "FLOAT8E4M3FN", "fp8_e5m2": "FLOAT8E5M2"}
_FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_SHIFT = 128  # from int8 to uint8


@dataclass(frozen=True)
class Layout:
    """How `DequantizeLinear` reads a weight.

    Attributes:
        shape: That of the elements.
        scales: That of the scales.
        axis: That the scales run along; None for one scale.
        block: Elements that share a scale along it; 0 for one each.
    """

    shape: tuple[int, ...]
    scales: tuple[int, ...]
    axis: int | None = None
    block: int = 0


def layout_of(shape: Sequence[int], counts: Sequence[int]) -> Layout | None:
    """The layout of a weight, or None where the op has none for its blocks.

    Args:
        shape: Of the weight.
        counts: Scales along each axis.
    """
    several = [axis for axis, count in enumerate(counts) if count > 1]
    if not several:
        return Layout(tuple(shape), ())
    if len(several) == 1 and counts[several[0]] == shape[several[0]]:
        return Layout(tuple(shape), (counts[several[0]],), several[0])
    last = several[-1]
    if any(counts[axis] != shape[axis] for axis in range(last)):
        return None
    # what one scale covers lies together: the axes behind are part of its block
    behind = math.prod(shape[last:])
    merged = (*shape[:last], behind)
    return Layout(merged, (*shape[:last], counts[last]), last, behind // counts[last])


@dataclass(frozen=True)
class Reading:
    """How the ops that read a weight compute.

    Attributes:
        integer: Their other operand is of integers with scales: the runtime fuses both into kernels
            of integers.
        unsigned: Weights become uint8, as these operands are, with 128 as zero point: without VNNI
            instructions the kernels add up products of uint8 and int8 in 16 bits, which saturate.
        dequantize: Use `DequantizeLinear` where they compute with floats, too.
    """

    integer: bool = False
    unsigned: bool = False
    dequantize: bool = False


def expand_shift_scale(emit: Emitter, node: Any, reading: Reading) -> tuple[Any, Any]:
    """The dense weight of integers or narrow floats with scales.

    ONNX Runtime keeps a `DequantizeLinear` of constants as it is: it serves kernels of integers, and
    costs as much as it has elements in every call elsewhere. Casts and products of constants are
    computed once, when a model is loaded.

    Args:
        emit: At the node.
        node: `shift_scale(data, scale, offset)`.
        reading: How the weight is read.

    Returns:
        The weight, and the node whose result it is: a transposition that alone reads the weight is
        part of it.
    """
    data, scale = node.inputs[:2]
    offset = node.inputs[2] if len(node.inputs) > 2 else None
    (result,) = node.outputs
    storage = node.attributes["storage"].as_string()
    shape = [int(size) for size in result.shape]
    factors = array_of(scale).astype(np.float32)
    shifts = None if offset is None else array_of(offset)
    if storage == "float":
        values, kind = data, data.dtype.name
        if reading.integer and _holds_bytes(kind, shape, factors, shifts):
            zeros = None if shifts is None else shifts.astype(np.int16)
            if reading.unsigned and kind == "INT8":
                values, zeros = _as_unsigned(emit, values, zeros, factors)
            layout = layout_of(shape, factors.shape)
            assert layout is not None
            return _as_type(
                emit, _dequantized(emit, values, result, layout, factors, zeros), result
            ), node
        return _scaled(emit, values, result, factors, shifts), node
    if storage == "fp4_e2m1":
        codes = emit.constant(_codes(data, storage, shape), f"{data.name}_codes", "UINT4")
        places = emit.call("Cast", [codes], codes, kind="INT32", to=_data_type("INT32"))
        table = emit.constant(np.concatenate([_FP4, -_FP4]), "fp4_values")
        values = emit.call("Gather", [table, places], result, kind="FLOAT", axis=0)
        return _scaled(emit, values, result, factors, shifts), node
    stored, kind = elements_of(data, storage, shape)
    integer = reading.integer and _holds_bytes(kind, shape, factors, shifts)
    minimum = shifts is not None and shifts.dtype.kind == "f"
    layout = layout_of(shape, factors.shape)
    if layout is None or minimum or not (integer or reading.dequantize):
        held = emit.constant(stored, f"{data.name}_values", kind)
        return _scaled(emit, held, result, factors, shifts), node
    zeros = None if shifts is None else shifts.astype(np.int16)
    if integer and reading.unsigned and kind == "INT8":
        stored, kind = (stored.astype(np.int16) + _SHIFT).astype(np.uint8), "UINT8"
        zeros = (np.zeros(factors.shape, np.int16) if zeros is None else zeros) + _SHIFT
    reader = _transposed(result) if len(shape) == 2 and layout.shape == tuple(shape) else None
    if reader is not None:
        stored = stored.T
        layout = _turned(layout)
        factors = factors.T
        zeros = None if zeros is None else zeros.T
        result, node = reader.outputs[0], reader
    if not integer:
        # a matrix itself would be taken for one of `MatMulNBits`, which rounds what it is multiplied by
        layout = _under_one(layout)
    held = emit.constant(stored.reshape(layout.shape), f"{data.name}_values", kind)
    made = _dequantized(emit, held, result, layout, factors, zeros)
    if list(layout.shape) != list(result.shape):
        made = emit.call("Reshape", [made, _ints(emit, list(result.shape))], result, kind="FLOAT")
    return _as_type(emit, made, result), node


def _holds_bytes(kind: str, shape: Sequence[int], factors: Array, shifts: Array | None) -> bool:
    """Whether kernels of integers take a weight: bytes with a scale, or with one per channel."""
    layout = layout_of(shape, factors.shape)
    minimum = shifts is not None and shifts.dtype.kind == "f"
    return kind in ("INT8", "UINT8") and layout is not None and not layout.block and not minimum


def _as_unsigned(
    emit: Emitter, values: Any, zeros: Array | None, factors: Array
) -> tuple[Any, Array]:
    """Computed int8 as uint8, and their zero points."""
    wide = emit.call("Cast", [values], values, kind="INT32", to=_data_type("INT32"))
    moved = emit.call("Add", [wide, emit.constant(np.array(_SHIFT, np.int32), "shift")], wide)
    narrow = emit.call("Cast", [moved], values, kind="UINT8", to=_data_type("UINT8"))
    return narrow, (np.zeros(factors.shape, np.int16) if zeros is None else zeros) + _SHIFT


def _dequantized(
    emit: Emitter, held: Any, result: Any, layout: Layout, factors: Array, zeros: Array | None
) -> Any:
    inputs = [held, emit.constant(factors.reshape(layout.scales), f"{held.name}_scale")]
    if zeros is not None:
        kind = held.dtype.name
        container = np.uint8 if kind.startswith("U") else np.int8
        points = zeros.reshape(layout.scales).astype(container)
        inputs.append(emit.constant(points, f"{held.name}_zero_point", kind))
    attributes: dict[str, Any] = {} if layout.axis is None else {"axis": layout.axis}
    if layout.block:
        attributes["block_size"] = layout.block
    return emit.call(
        "DequantizeLinear", inputs, result, kind="FLOAT", shape=list(layout.shape), **attributes
    )


def _scaled(emit: Emitter, values: Any, result: Any, factors: Array, shifts: Array | None) -> Any:
    """`(values − shift) · scale` in float32, block by block."""
    shape = [int(size) for size in result.shape]
    counts = factors.shape
    if values.dtype.name != "FLOAT":
        values = emit.call("Cast", [values], result, kind="FLOAT", to=_data_type("FLOAT"))
    pairs = list(zip(counts, shape, strict=True))
    whole = all(count in (1, size) for count, size in pairs)
    given = list(counts) if whole else [part for count in counts for part in (count, 1)]
    if not whole:
        parts = [part for count, size in pairs for part in (count, size // count)]
        values = emit.call(
            "Reshape", [values, _ints(emit, parts)], result, kind="FLOAT", shape=parts
        )
    if shifts is not None:
        low = emit.constant(shifts.astype(np.float32).reshape(given), f"{result.name}_shift")
        values = emit.call("Sub", [values, low], values)
    factor = emit.constant(factors.reshape(given), f"{result.name}_scale")
    values = emit.call("Mul", [values, factor], values)
    if not whole:
        values = emit.call("Reshape", [values, _ints(emit, shape)], result, kind="FLOAT")
    return _as_type(emit, values, result)


def elements_of(data: Any, storage: str, shape: Sequence[int]) -> tuple[Array, str]:
    """Elements, one a byte, and their type as onnx_ir spells it."""
    codes = _codes(data, storage, shape)
    if storage in _FP8:
        return codes, _FP8[storage]
    if storage.startswith("int"):
        bits = STORAGE_BITS[storage]
        wide = codes.astype(np.int16)
        codes = np.where(wide >= 2 ** (bits - 1), wide - 2**bits, wide).astype(np.int8)
    return codes, storage.upper()


def _codes(data: Any, storage: str, shape: Sequence[int]) -> Array:
    return stored_codes(array_of(data).view(np.uint8), STORAGE_BITS[storage], shape)


def _transposed(value: Any) -> Any:
    """The node that turns a matrix, where nothing else reads it."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    if node.op_type != "Transpose" or node.domain:
        return None
    order = node.attributes.get("perm")
    return node if order is None or list(order.as_ints()) == [1, 0] else None


def _turned(layout: Layout) -> Layout:
    """The layout of the transposed matrix."""
    scales = layout.scales[::-1]
    axis = None if layout.axis is None else 1 - layout.axis
    return Layout(layout.shape[::-1], scales, axis, layout.block)


def _under_one(layout: Layout) -> Layout:
    """The layout of the weight as the only element of a first axis."""
    if layout.axis is None:
        return Layout((1, *layout.shape), ())
    scales = (1, *layout.scales) if layout.block else layout.scales
    return Layout((1, *layout.shape), scales, layout.axis + 1, layout.block)


def _as_type(emit: Emitter, value: Any, result: Any) -> Any:
    if value.dtype == result.dtype:
        return value
    return emit.call("Cast", [value], result, to=result.dtype)


def _data_type(name: str) -> Any:
    import onnx_ir as ir

    return ir.DataType[name]


def _ints(emit: Emitter, values: Sequence[int]) -> Any:
    return emit.constant(np.array(values, np.int64), "sizes")
