"""Lookups and sparse weights: packed codes, shift and mask ops, `Gather`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphopt.backends.onnx.emitter import Emitter, array_of
from graphopt.numerics.packing import unpack

__all__ = ["PADDED", "expand_lookup", "expand_sparse", "stored_codes"]

Array = NDArray[Any]
# widths whose codes do not end with a byte, or with three: they are stored one a byte
PADDED = ((5, 8), (7, 8))
_WHOLE_BYTES = (1, 2)
_THREE_BYTES = (3, 6)


def stored_codes(packed: Array, n_bits: int, shape: Sequence[int]) -> Array:
    """Codes, uint8 of `shape`, of a buffer of ours."""
    flat = torch.from_numpy(np.ascontiguousarray(packed).reshape(-1).copy())
    return unpack(flat, n_bits, math.prod(shape)).numpy().reshape(list(shape))


def expand_lookup(emit: Emitter, node: Any) -> Any:
    """`Gather` of a table's entries at the codes.

    With several tables, the table's place is added to each code; entries longer than one are moved
    to the axis that they lie on.

    Args:
        emit: At the node.
        node: `lut_to_dense(indices, lut)`.

    Returns:
        The dense weight.
    """
    indices, lut = node.inputs
    (result,) = node.outputs
    n_bits = node.attributes["n_bits"].as_int()
    axis = node.attributes["vector_axis"].as_int()
    shape, table = [int(size) for size in result.shape], [int(size) for size in lut.shape]
    *groups, entries, length = table
    index_shape = [
        size // length if place == axis and length > 1 else size for place, size in enumerate(shape)
    ]
    codes = _codes(emit, indices, n_bits, index_shape)
    if math.prod(groups) > 1:
        offsets = _places(emit, groups, index_shape, entries, str(result.name))
        for offset in offsets:
            codes = emit.call("Add", [codes, offset], codes)
    flat = [-1] if length == 1 else [-1, length]
    if lut.const_value is not None:
        rows = emit.constant(array_of(lut).reshape(flat), str(lut.name))
    else:
        rows = emit.call("Reshape", [lut, _ints(emit, flat)], lut, shape=None)
        rows.shape = None
    if length == 1:
        return emit.call("Gather", [rows, codes], result, axis=0)
    found = emit.call("Gather", [rows, codes], result, shape=[*index_shape, length], axis=0)
    order = list(range(len(shape)))
    order.insert(axis + 1, len(shape))
    moved = emit.call(
        "Transpose", [found], result, shape=[[*index_shape, length][k] for k in order], perm=order
    )
    return emit.call("Reshape", [moved, _ints(emit, shape)], result)


def expand_sparse(emit: Emitter, node: Any) -> Any:
    """`ScatterElements` of the values onto zeros, at the places of the mask's bits.

    Args:
        emit: At the node.
        node: `sparse_to_dense(values, mask)`.

    Returns:
        The dense weight.
    """
    import onnx_ir as ir

    values, mask = node.inputs
    (result,) = node.outputs
    shape = [int(size) for size in result.shape]
    count = math.prod(shape)
    bits = _codes(emit, mask, 1, [count])
    kept = emit.call("Cast", [bits], bits, kind="BOOL", to=ir.DataType.BOOL)
    places = emit.call("NonZero", [kept], bits, kind="INT64", shape=[1, None])
    where = emit.call("Reshape", [places, _ints(emit, [-1])], places, shape=[None])
    zero = ir.tensor(np.zeros(1, result.dtype.numpy()))
    empty = emit.call("ConstantOfShape", [_ints(emit, [count])], result, shape=[count], value=zero)
    put = emit.call("ScatterElements", [empty, where, values], result, shape=[count], axis=0)
    return emit.call("Reshape", [put, _ints(emit, shape)], result)


def _codes(emit: Emitter, indices: Any, n_bits: int, shape: Sequence[int]) -> Any:
    """Codes as int32 of `shape`, stored in as few bits as the ops of the standard can take apart."""
    import onnx_ir as ir

    packed, name = array_of(indices), str(indices.name)
    count = math.prod(shape)
    if n_bits in (*_WHOLE_BYTES, *_THREE_BYTES):
        flat = _shifted(emit, packed, n_bits, name)
        if flat.meta["count"] != count:
            ends = [_ints(emit, [0]), _ints(emit, [count]), _ints(emit, [0])]
            flat = emit.call("Slice", [flat, *ends], flat, shape=[count])
        codes = emit.call("Reshape", [flat, _ints(emit, shape)], flat, shape=list(shape))
    else:
        kind = "UINT4" if n_bits == 4 else "UINT8"
        codes = emit.constant(stored_codes(packed, n_bits, shape), f"{name}_codes", kind)
    return emit.call("Cast", [codes], codes, kind="INT32", to=ir.DataType.INT32)


def _shifted(emit: Emitter, packed: Array, n_bits: int, name: str) -> Any:
    """Codes of a buffer whose bytes, or groups of three bytes, hold a whole number of them."""
    import onnx_ir as ir

    if n_bits in _WHOLE_BYTES:
        stored = emit.constant(packed.reshape(-1, 1), f"{name}_bytes", "UINT8")
        group, kind = 8, "uint8"
    else:
        rest = -len(packed) % 3
        triples = np.concatenate([packed, np.zeros(rest, np.uint8)]).reshape(-1, 3)
        held = emit.constant(triples, f"{name}_bytes")
        wide = emit.call("Cast", [held], held, kind="INT32", to=ir.DataType.INT32)
        weights = emit.constant(np.array([1, 1 << 8, 1 << 16], np.int32), "places_of_bytes")
        parts = emit.call("Mul", [wide, weights], wide)
        sums = emit.call(
            "ReduceSum", [parts, _ints(emit, [1])], parts, shape=[len(triples), 1], keepdims=1
        )
        stored = emit.call("Cast", [sums], sums, kind="UINT32", to=ir.DataType.UINT32)
        group, kind = 24, "uint32"
    each = group // n_bits
    shifts = emit.constant(np.arange(0, group, n_bits, dtype=kind), "places_of_codes")
    mask = emit.constant(np.array(2**n_bits - 1, dtype=kind), "mask_of_codes")
    rows = int(stored.shape[0])
    moved = emit.call("BitShift", [stored, shifts], stored, shape=[rows, each], direction="RIGHT")
    cut = emit.call("BitwiseAnd", [moved, mask], moved)
    flat = emit.call("Reshape", [cut, _ints(emit, [-1])], cut, shape=[rows * each])
    flat.meta["count"] = rows * each
    return flat


def _places(
    emit: Emitter, groups: Sequence[int], shape: Sequence[int], entries: int, name: str
) -> list[Any]:
    """What is added to codes along each axis, so that they point into the table of their group."""
    found, stride = [], entries
    for axis in reversed(range(len(groups))):
        if groups[axis] > 1:
            place = np.arange(shape[axis]) // (shape[axis] // groups[axis]) * stride
            along = [-1 if other == axis else 1 for other in range(len(shape))]
            found.append(emit.constant(place.astype(np.int32).reshape(along), f"{name}_tables"))
        stride *= groups[axis]
    return found


def _ints(emit: Emitter, values: Sequence[int]) -> Any:
    return emit.constant(np.array(values, np.int64), "sizes")
