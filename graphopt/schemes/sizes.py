"""Sizes of compressed weights: the one place that counts bits, from specs, tensors and graphs alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.analysis.stored_values import StoredValue
from graphopt.specs.dtypes import bits_of
from graphopt.specs.storage import Codes, StorageRules

__all__ = [
    "Parts",
    "code_width",
    "coded_bits",
    "dense_bits",
    "entropy",
    "mask_bits",
    "padding",
    "tensor_bits",
    "whole_bytes",
]

_TABLE_OF_TYPE_BITS = 8  # entries of a table that lists the values of an integer type


@dataclass(frozen=True)
class Parts:
    """What is stored of one compressed weight, counted.

    Attributes:
        elements: Elements of the dense weight.
        codes: Its packed elements and tables; None without any.
        side_bits: Bits of all the rest: scales, offsets, masks, outliers, values.
    """

    elements: int
    codes: Codes | None = None
    side_bits: int = 0

    def bits(self, rules: StorageRules | None = None) -> int:
        """Bits that an artifact stores; None counts every code at its own width."""
        rules = StorageRules() if rules is None else rules
        codes = self.codes
        if codes is None:
            return self.side_bits
        width = code_width(codes, rules)
        if width is None:
            return self.elements * bits_of(rules.float_dtype)
        total = self.side_bits + whole_bytes(codes.count * width)
        if codes.storage and codes.storage in rules.table_types:
            return total + 2**width * _TABLE_OF_TYPE_BITS
        return total + whole_bytes(codes.tables * 2**width * codes.slot_bits)


def code_width(codes: Codes, rules: StorageRules) -> int | None:
    """Stored width of codes; None where the weight is expanded, as the artifact has no tables."""
    if not codes.storage:
        return rules.code_bits(codes.bits)
    if codes.storage in rules.table_types:
        return rules.code_bits(codes.bits) or codes.bits
    return codes.bits


def whole_bytes(bits: int) -> int:
    """The bits of the bytes that hold `bits`."""
    return 8 * -(-bits // 8)


def tensor_bits(*tensors: Tensor | None) -> int:
    """Bits of tensors as they are; None takes none."""
    return sum(8 * each.numel() * each.element_size() for each in tensors if each is not None)


def dense_bits(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bits of an uncompressed tensor."""
    return math.prod(shape) * bits_of(dtype)


def mask_bits(shape: Sequence[int]) -> int:
    """Bits of a mask with one bit per element."""
    return whole_bytes(math.prod(shape))


def padding(value: StoredValue, rules: StorageRules) -> tuple[int, int] | None:
    """Width of the codes of a graph's weight in an artifact, and the bits added to their own width.

    None where the artifact holds them as they are, or expands them.
    """
    codes = value.codes
    width = None if codes is None else code_width(codes, rules)
    if width is None:
        return None
    parts = Parts(math.prod(value.shape), codes)
    more = parts.bits(rules) - parts.bits()
    return (width, more) if more else None


def entropy(counts: Tensor) -> float:
    """Bits of an ideal coder for symbols that occur so often: `Σ −n log₂(n / N)`."""
    wide = counts.double()
    used = wide[wide > 0]
    return float(-(used * (used / used.sum()).log2()).sum()) if used.numel() else 0.0


def coded_bits(parts: Parts, symbols: Tensor | None) -> float:
    """Bits of a weight whose codes an ideal coder compresses, one distribution per tensor.

    Scales, zero points and tables are counted as they are stored. Targets store codes at a fixed
    width: this is what a compressed download takes, not what lies in memory.

    Args:
        parts: What is stored.
        symbols: The codes, any shape; None codes nothing.
    """
    if symbols is None or parts.codes is None:
        return float(parts.bits())
    _, counts = symbols.unique(return_counts=True)
    return parts.bits() - whole_bytes(parts.codes.count * parts.codes.bits) + entropy(counts)
