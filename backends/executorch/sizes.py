"""What a compressed weight costs in a .pte, from what will be stored of it and who reads it."""

from __future__ import annotations

from torch import fx

from graphopt.backends.executorch.compress_tables import BYTE, TABLE_SHARE
from graphopt.backends.executorch.kernels import LINEAR, LOOKUPS, takes_integers
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
    rows = reader is not None and reader.target in LOOKUPS
    if not codes.storage:
        if tables == "compressed" or (tables == "auto" and rows and codes.bits in (1, 2, 4, 8)):
            return min(dense, _decoded(parts, codes, rules))
        whole = codes.slot_bits == _ELEMENT and codes.tables == 1
        integers = whole and (tables == "int8" or (tables == "auto" and rounded))
        return parts.elements * _ELEMENT if integers else dense
    linear = reader is None or reader.target in LINEAR
    with_integers = rounded and reader is not None and takes_integers(reader)
    if tables != "compressed" and not (linear or rows or with_integers):
        return dense
    eight = codes.bits == _ELEMENT and (linear or rows)
    if tables == "compressed" and not with_integers and not eight:
        return min(dense, parts.side_bits + _decoded(parts, codes, rules))
    scales = parts.side_bits // bits_of(rules.float_dtype)
    return parts.elements * _ELEMENT + scales * (_FLOAT + _ZERO_POINT)


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
