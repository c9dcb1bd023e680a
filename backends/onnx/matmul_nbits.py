"""Products with 4- and 8-bit weights in ONNX Runtime's own op, where that computes the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from graphopt.analysis.stored_values import find_lookups
from graphopt.backends.onnx.emitter import Emitter, array_of
from graphopt.backends.onnx.scales import elements_of
from graphopt.ir import op_info
from graphopt.passes import TablesToIntegers

__all__ = ["MICROSOFT", "as_matmul_nbits", "integers_of_tables", "is_plain"]

MICROSOFT = "com.microsoft"
Array = NDArray[Any]
_BITS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8}
_LEAST_BLOCK = 16
_OWN_BLOCK = 32  # where one scale serves a whole row, it is repeated for each block
_FLOAT32 = 1  # accuracy level; without one sessions may round what is multiplied to int8


_LINEAR = frozenset(op_info.named("linear"))


def integers_of_tables(gm: fx.GraphModule) -> TablesToIntegers:
    """The pass that makes 8-bit integers of the tables of such that linear layers alone look up.

    Args:
        gm: In our vocabulary. Tables of other rows, or along blocks that the op has not, stay.
    """
    fitting = {
        lookup.dense
        for lookup in find_lookups(gm)
        if lookup.tables[1:] in ((), (1,)) or _is_block(lookup.shape[1] // lookup.tables[1])
    }

    def wanted(weight: fx.Node, reader: fx.Node) -> bool:
        return weight in fitting and reader.target in _LINEAR

    return TablesToIntegers(wanted)


def _is_block(length: int) -> bool:
    return length >= _LEAST_BLOCK and not length & (length - 1)


@dataclass(frozen=True)
class _Product:
    """A node that multiplies by a weight.

    Attributes:
        node: `MatMul` or `Gemm`.
        bias: What a `Gemm` adds.
    """

    node: Any
    bias: Any = None


def as_matmul_nbits(emit: Emitter, weight: Any) -> bool:
    """Replace the products with a weight by `MatMulNBits`, computed in float32.

    Its blocks run along the axis that is summed over, a power of two and at least 16 long.

    Args:
        emit: Of the graph.
        weight: `shift_scale(data, scale, offset)`.

    Returns:
        Whether it was done; nothing reads the weight then.
    """
    data, scale = weight.inputs[:2]
    offset = weight.inputs[2] if len(weight.inputs) > 2 else None
    (result,) = weight.outputs
    storage = weight.attributes["storage"].as_string()
    shape = [int(size) for size in result.shape]
    if storage not in _BITS or len(shape) != 2 or result.dtype.name != "FLOAT":
        return False
    shifts = None if offset is None else array_of(offset)
    if shifts is not None and shifts.dtype.kind == "f":
        return False
    readers, turned = _products(result)
    if not readers:
        return False
    values, _ = elements_of(data, storage, shape)
    factors = array_of(scale).astype(np.float32)
    zeros = np.zeros(factors.shape, np.int16) if shifts is None else shifts.astype(np.int16)
    if not turned:
        values, factors, zeros = values.T, factors.T, zeros.T
    blocks = _blocked(values.shape, factors, zeros)
    if blocks is None:
        return False
    block, factors, zeros = blocks
    bits = _BITS[storage]
    lowest = 0 if storage.startswith("u") else -(2 ** (bits - 1))
    operands = _operands(
        emit, str(data.name), values - lowest, factors, zeros - lowest, bits, block
    )
    n, k = values.shape
    for product in readers:
        emit.place = product.node
        (old,) = product.node.outputs
        given = [product.node.inputs[0], *operands]
        made = emit.call(
            "MatMulNBits",
            given,
            old,
            domain=MICROSOFT,
            K=k,
            N=n,
            bits=bits,
            block_size=block,
            accuracy_level=_FLOAT32,
        )
        if product.bias is not None:
            made = emit.call("Add", [made, product.bias], old)
        emit.replace(made)
    return True


def _products(value: Any) -> tuple[list[_Product], bool]:
    """The products that read a weight, and whether it has a row for each output; none if others do."""
    if value.is_graph_output():
        return [], False
    found, turns = [], set()
    for use in value.uses():
        node, place = use.node, use.idx
        if node.domain or place != 1:
            if not node.domain and node.op_type == "Transpose" and _turns(node):
                behind, inner = _products(node.outputs[0])
                if not behind or inner:
                    return [], False
                found += behind
                turns.add(True)
                continue
            return [], False
        if node.op_type == "MatMul":
            found.append(_Product(node))
            turns.add(False)
        elif node.op_type == "Gemm" and is_plain(node):
            found.append(_Product(node, node.inputs[2] if len(node.inputs) > 2 else None))
            turns.add(bool(_int(node, "transB")))
        else:
            return [], False
    return (found, turns.pop()) if len(turns) == 1 else ([], False)


def _turns(node: Any) -> bool:
    order = node.attributes.get("perm")
    return order is None or list(order.as_ints()) == [1, 0]


def is_plain(node: Any) -> bool:
    """Whether a `Gemm` scales nothing and takes its first operand as it is."""
    scales = [
        node.attributes[key].as_float() for key in ("alpha", "beta") if key in node.attributes
    ]
    return not _int(node, "transA") and all(value == 1.0 for value in scales)


def _int(node: Any, key: str) -> int:
    return int(node.attributes[key].as_int()) if key in node.attributes else 0


def _blocked(
    shape: tuple[int, ...], factors: Array, zeros: Array
) -> tuple[int, Array, Array] | None:
    """Length of a block, and scale and zero point of each, [rows, blocks]; None if there are none."""
    n, k = shape
    if factors.shape[1] == k:
        factors, zeros = _gathered(factors, zeros)
    if factors.shape[1] == 1:
        block, count = _OWN_BLOCK, -(-k // _OWN_BLOCK)
    else:
        count = factors.shape[1]
        block = k // count
        if not _is_block(block):
            return None
    if factors.shape[0] not in (1, n):
        return None
    whole = (n, count)
    return block, np.broadcast_to(factors, whole), np.broadcast_to(zeros, whole)


def _gathered(factors: Array, zeros: Array) -> tuple[Array, Array]:
    """One scale and zero point for every 16 columns, where all those of 16 are the same."""
    count, rest = divmod(factors.shape[1], _LEAST_BLOCK)
    if rest:
        return factors, zeros
    both = [x.reshape(len(x), count, _LEAST_BLOCK) for x in (factors, zeros)]
    if any((x != x[..., :1]).any() for x in both):
        return factors, zeros
    return both[0][..., 0], both[1][..., 0]


def _operands(
    emit: Emitter, name: str, codes: Array, factors: Array, zeros: Array, bits: int, block: int
) -> list[Any]:
    """Weight, scales and zero points as the op has them: rows of blocks of packed bytes."""
    n, k = codes.shape
    count = factors.shape[1]
    padded: Array = np.zeros((n, count * block), np.uint8)
    padded[:, :k] = codes
    points: Array = zeros.astype(np.uint8)
    if bits == 4:
        padded = padded[:, 0::2] | (padded[:, 1::2] << 4)
        points = np.pad(points, ((0, 0), (0, count % 2)))
        points = points[:, 0::2] | (points[:, 1::2] << 4)
    return [
        emit.constant(padded.reshape(n, count, block * bits // 8), f"{name}_blocks"),
        emit.constant(np.ascontiguousarray(factors), f"{name}_block_scales"),
        emit.constant(points, f"{name}_block_zeros"),
    ]
