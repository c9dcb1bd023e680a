"""What decides the size of a compressed weight: its codes, and how an artifact holds such."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Codes", "StorageRules"]


@dataclass(frozen=True)
class Codes:
    """The packed elements of a compressed weight and what they point to.

    Attributes:
        count: Indices, or integers.
        bits: Width of each.
        storage: Element type where they are numbers themselves, "" where they are indices.
        tables: Tables that they look up.
        slot_bits: Bits of one table entry.
    """

    count: int
    bits: int
    storage: str = ""
    tables: int = 0
    slot_bits: int = 0


@dataclass(frozen=True)
class StorageRules:
    """What decides the size of a compressed weight in an artifact.

    Attributes:
        index_bits: Widths of codes that are stored as such; None for all.
        padded_bits: Width → stored width of those that are held exactly in a wider form.
        table_types: Element types of integers that are held as codes of a table with every value of
            the type.
        float_dtype: Type of tables, scales and uncompressed weights.
        lut_dtype: Type of table entries where it differs.
    """

    index_bits: tuple[int, ...] | None = None
    padded_bits: tuple[tuple[int, int], ...] = ()
    table_types: tuple[str, ...] = ()
    float_dtype: torch.dtype = torch.float16
    lut_dtype: torch.dtype | None = None

    def code_bits(self, n_bits: int) -> int | None:
        """Width that a code of `n_bits` takes, None where it cannot be held."""
        if self.index_bits is None or n_bits in self.index_bits:
            return n_bits
        return dict(self.padded_bits).get(n_bits)
