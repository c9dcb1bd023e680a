"""Sizes of compressed weights as a target stores them."""

from __future__ import annotations

from dataclasses import replace

from graphopt.analysis.stored_values import stored_values
from graphopt.backends import load_backend
from graphopt.backends.registry import ExportBackend
from graphopt.ir.program import Program
from graphopt.report.table import CompressionTable, table_of
from graphopt.schemes.sizes import padding

__all__ = ["as_stored"]


def as_stored(program: Program, backend: ExportBackend | str | None = None) -> CompressionTable:
    """A program's report with the bits that a target stores, where it pads codes.

    Core AI keeps codes of 3 bits in 4, and integers that it has no type for as codes of a table that
    holds every value of the type.

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
    padded = {
        value.name: found
        for value in stored_values(program.graph_module)
        if (found := padding(value, rules)) is not None
    }
    rows = []
    for row in table:
        if row.name in padded:
            width, more = padded[row.name]
            note = f"{row.note}; " if row.note else ""
            row = replace(
                row, stored_bits=row.stored_bits + more, note=f"{note}stored as {width}-bit codes"
            )
        rows.append(row)
    return replace(table, rows=tuple(rows))
