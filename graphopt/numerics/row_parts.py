"""Large weights decoded a few rows at a time: what is computed on the way takes several times their memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.numerics.packing import packed_size

__all__ = ["packed_rows", "parts_of_rows", "rows_of_blocks"]

_AT_ONCE = 1 << 20  # elements


def parts_of_rows(shape: Sequence[int], *read: Tensor) -> list[tuple[int, int]] | None:
    """First row and the one after the last of each part, whose codes begin with a byte.

    Args:
        shape: Of the codes.
        read: What values are computed from.

    Returns:
        The parts; None for a small weight, and where gradients need all of it.
    """
    if math.prod(shape) <= 2 * _AT_ONCE:
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read):
        return None
    row = math.prod(shape[1:])
    least = 8 // math.gcd(row, 8)
    step = max(1, _AT_ONCE // (row * least)) * least
    return [(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


def packed_rows(packed: Tensor, n_bits: int, row: int, first: int, last: int) -> Tensor:
    """The bytes of rows `first` … `last` − 1 of `row` codes each; they begin with a byte."""
    return packed[first * row * n_bits // 8 : packed_size(last * row, n_bits)]


def rows_of_blocks(blocks: Tensor, size: int, first: int, last: int) -> Tensor:
    """What belongs to each of rows `first` … `last` − 1 of `size`; one row where all have the same.

    Args:
        blocks: One row for as many of the weight's as it divides `size` into.
        size: Rows of the weight.
        first: The first of the part.
        last: The one after its last.
    """
    if blocks.shape[0] == 1:
        return blocks
    rows = torch.arange(first, last, device=blocks.device) // (size // blocks.shape[0])
    return blocks[rows]
