"""Sizes of compressed weights as a target stores them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, fx

from graphopt.analysis.stored_values import (
    QuantizedTensor,
    find_quantized_weights,
    stored_values,
)
from graphopt.backends import load_backend
from graphopt.backends.registry import ExportBackend
from graphopt.ir.program import Program
from graphopt.report.table import CompressionTable, table_of
from graphopt.schemes.sizes import padding
from graphopt.specs.dtypes import bits_of, dtype_name
from graphopt.specs.storage import StorageRules

__all__ = ["as_stored"]


def as_stored(program: Program, backend: ExportBackend | str | None = None) -> CompressionTable:
    """A program's report with the bits that a target stores, where it pads codes or widens scales.

    Core AI keeps codes of 3 bits in 4, and integers that it has no type for as codes of a table that
    holds every value of the type; only some targets hold e8m0 scales in a byte.

    Args:
        program: What a compressor made.
        backend: The target; None, and targets that expand tables, leave the codes' own width.

    Raises:
        LoweringError: There is no such target.
    """
    table = table_of(program)
    if backend is None:
        return table
    rules = load_backend(backend).capabilities.storage
    added: dict[str, list[tuple[int, str]]] = {}
    for value in stored_values(program.graph_module):
        wider = padding(value, rules)
        if wider is not None:
            added.setdefault(value.name, []).append((wider[1], f"stored as {wider[0]}-bit codes"))
    for weight in find_quantized_weights(program.graph_module):
        more, kind = _wider_scales(weight, rules)
        if more:
            added.setdefault(weight.name, []).append((more, f"scales stored as {kind}"))
    rows = []
    for row in table:
        for bits, words in added.get(row.name, []):
            note = f"{row.note}; {words}" if row.note else words
            row = replace(row, stored_bits=row.stored_bits + bits, note=note)
        rows.append(row)
    return replace(table, rows=tuple(rows))


def _wider_scales(weight: QuantizedTensor, rules: StorageRules) -> tuple[int, str]:
    """Bits that a target adds to e8m0 scales by holding them as floats, and the floats' type."""
    scale = weight.node.args[1]
    known = scale.meta.get("val") if isinstance(scale, fx.Node) else None
    if not isinstance(known, Tensor) or dtype_name(known.dtype) != "float8_e8m0fnu":
        return 0, ""
    if rules.keeps_power_scales(weight.storage):
        return 0, ""
    floats = weight.node.meta["val"].dtype
    return known.numel() * (bits_of(floats) - bits_of(known.dtype)), dtype_name(floats)
