"""Codes of a byte each, as targets want them, which are held packed and unpacked while they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.ir.decoded_tensor import DecodedTensor
from graphopt.numerics.packing import pack, unpack

__all__ = ["PackedCodes", "packed_of", "unpacked"]

_SMALL = 1 << 16


@dataclass(frozen=True)
class PackedCodes:
    """What stands for codes of a byte each.

    Attributes:
        packed: What `pack` gave.
        n_bits: 1 … 8.
        shape: Of the codes.
    """

    packed: Tensor
    n_bits: int
    shape: tuple[int, ...]

    def dense(self) -> Tensor:
        """The codes, uint8, in new memory."""
        codes = unpack(self.packed, self.n_bits, math.prod(self.shape)).reshape(self.shape)
        return codes.clone() if self.n_bits == 8 else codes


def unpacked(packed: Tensor, n_bits: int, shape: tuple[int, ...]) -> Tensor:
    """Codes as a constant, not to be written into, that takes the memory of `packed` alone if it is large.

    Args:
        packed: What `pack` gave.
        n_bits: 1 … 8.
        shape: Of the codes.

    Returns:
        uint8 of that shape.
    """
    codes = PackedCodes(packed, n_bits, shape)
    if math.prod(shape) < _SMALL:
        return codes.dense()
    like = torch.empty(1, dtype=torch.uint8, device=packed.device).expand(shape)
    return DecodedTensor(codes, like, fixed=True)


def packed_of(codes: Tensor, n_bits: int) -> Tensor:
    """Codes of a byte each as `pack` packs them; of what `unpacked` gave, the same tensor again."""
    if isinstance(codes, DecodedTensor):
        stored = codes.source
        if isinstance(stored, PackedCodes) and stored.n_bits == n_bits:
            return stored.packed
    return pack(codes, n_bits)
