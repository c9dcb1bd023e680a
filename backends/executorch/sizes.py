"""What a compressed weight costs in a .pte, from what will be stored of it and who reads it."""

from __future__ import annotations

import math

from torch import fx

from graphopt.backends.executorch.compress_tables import BYTE, TABLE_SHARE
from graphopt.backends.executorch.integer_kernels import NARROW
from graphopt.backends.executorch.kernels import EMBEDDINGS, LINEAR, takes_integers
from graphopt.backends.executorch.options import Tables
from graphopt.schemes.sizes import Parts, whole_bytes
from graphopt.specs.dtypes import bits_of
from graphopt.specs.storage import Codes, StorageRules

__all__ = ["stored_bits"]

_ELEMENT = 8  # bits of an integer weight, whatever its own width
_FLOAT = 32
_ZERO_POINT = 64  # beside every scale


def stored_bits(
    parts: Parts,
    rules: StorageRules,
    tables: Tables,
    reader: fx.Node | None = None,
    *,
    rounded: bool = False,
) -> int:
    """Bits of one weight.

    Args:
        parts: What is stored of it in our own vocabulary.
        rules: Float types.
        tables: What becomes of lookup tables.
        reader: The op that reads it; None is a linear layer.
        rounded: Whether the op computes with rounded activations.
    """
    dense = parts.elements * bits_of(rules.float_dtype)
    codes = parts.codes
    if codes is None:
        return dense
    rows = reader is not None and reader.target in EMBEDDINGS
    linear = reader is None or reader.target in LINEAR
    if not codes.storage:
        if tables == "compressed" or (tables == "auto" and rows and codes.bits in (1, 2, 4, 8)):
            return min(dense, _decoded(parts, codes, rules))
        whole = codes.slot_bits == _ELEMENT and codes.tables == 1
        gains = tables == "int8" or (tables == "auto" and (rounded or linear))
        return parts.elements * _ELEMENT if whole and gains else dense
    scales = parts.side_bits // bits_of(rules.float_dtype)
    width = _ELEMENT
    kernel = rounded and reader is not None and takes_integers(reader)
    if linear and not kernel and scales <= _outputs(reader):
        kernel, width = True, NARROW if codes.bits <= NARROW else _ELEMENT
    tightly = tables == "compressed" and not rounded
    if kernel and not (tightly and codes.bits < width):
        return parts.elements * width + scales * _FLOAT
    runs = linear or rows
    if tables in ("auto", "compressed") and (codes.bits < _ELEMENT or not runs):
        return min(dense, parts.side_bits + _decoded(parts, codes, rules))
    return parts.elements * _ELEMENT + scales * (_FLOAT + _ZERO_POINT) if runs else dense


def _outputs(linear: fx.Node | None) -> float:
    """Output channels of a layer: more scales are of blocks, or have zero points beside them."""
    weight = None if linear is None else linear.args[1]
    value = weight.meta.get("val") if isinstance(weight, fx.Node) else None
    return math.inf if value is None else int(value.shape[0])


def _decoded(parts: Parts, codes: Codes, rules: StorageRules) -> int:
    """Codes in bytes, and the tables that decode them (see `compress_tables`)."""
    packed = whole_bytes(codes.count * codes.bits)
    entry = parts.elements // codes.count * bits_of(rules.float_dtype)
    count = max(1, codes.tables)
    if codes.bits in (1, 2, 4, 8):
        direct = count * BYTE * (8 // codes.bits) * entry
        if direct <= TABLE_SHARE * packed:
            return packed + direct
    return packed + count * 2**codes.bits * entry
