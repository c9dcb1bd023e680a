"""Sizes of compressed weights as a target stores them."""

from __future__ import annotations

import math
from dataclasses import replace

from graphopt.analysis.lookups import find_lookups
from graphopt.analysis.quantized import find_quantized_weights
from graphopt.backends import load_backend
from graphopt.backends.registry import ExportBackend
from graphopt.ir.program import Program
from graphopt.numerics.packing import packed_size
from graphopt.report.table import CompressionTable, table_of
from graphopt.specs.dtypes import bits_of, parse_dtype

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
    capabilities = load_backend(backend).capabilities
    padded: dict[str, tuple[int, int]] = {}
    for lookup in find_lookups(program.graph_module):
        width = capabilities.stored_bits(lookup.n_bits)
        if width is None or width == lookup.n_bits:
            continue
        codes = math.prod(lookup.shape) // lookup.entries
        slots = (2**width - 2**lookup.n_bits) * math.prod(lookup.tables) * lookup.entries
        more = slots * bits_of(parse_dtype(lookup.lut_dtype))
        padded[lookup.name] = (width, more + _padding(codes, lookup.n_bits, width))
    for weight in find_quantized_weights(program.graph_module):
        if weight.storage in capabilities.table_types:
            bits = bits_of(parse_dtype(weight.storage))
            width = capabilities.stored_bits(bits) or bits
            more = 8 * 2**width + _padding(math.prod(weight.shape), bits, width)
            padded[weight.name] = (width, more)
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


def _padding(count: int, bits: int, width: int) -> int:
    return 8 * (packed_size(count, width) - packed_size(count, bits))
