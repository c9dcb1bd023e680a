"""What decides the size of a compressed weight: its codes, and how an artifact holds such."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from graphopt.specs.dtypes import bits_of, dtype_name

__all__ = ["Codes", "PowerScales", "StorageRules"]

PowerScales = Literal["all", "floats", "none"]  # narrow floats alone, for "floats"


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
        power_scales: Weights whose e8m0 scales are held in a byte; others hold them as floats.
        bfloat16_scales: Whether scales in bfloat16 are held as such.
    """

    index_bits: tuple[int, ...] | None = None
    padded_bits: tuple[tuple[int, int], ...] = ()
    table_types: tuple[str, ...] = ()
    float_dtype: torch.dtype = torch.float16
    lut_dtype: torch.dtype | None = None
    power_scales: PowerScales = "all"
    bfloat16_scales: bool = True

    def keeps_power_scales(self, storage: str) -> bool:
        """Whether e8m0 scales of weights of an element type are held in a byte."""
        return self.power_scales == "all" or (
            self.power_scales == "floats" and "int" not in storage
        )

    def scale_bits(self, dtype: torch.dtype | None, storage: str) -> int:
        """Bits of one scale.

        Args:
            dtype: Type that it was asked for in; None is that of floats.
            storage: Element type of the weight.
        """
        if dtype is None:
            return bits_of(self.float_dtype)
        powers = dtype_name(dtype) == "float8_e8m0fnu"
        held = self.bfloat16_scales or dtype is not torch.bfloat16
        held = self.keeps_power_scales(storage) if powers else held
        return bits_of(dtype if held else self.float_dtype)

    def code_bits(self, n_bits: int) -> int | None:
        """Width that a code of `n_bits` takes, None where it cannot be held."""
        if self.index_bits is None or n_bits in self.index_bits:
            return n_bits
        return dict(self.padded_bits).get(n_bits)
