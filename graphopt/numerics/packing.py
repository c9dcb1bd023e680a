"""Bit packing: `n`-bit codes, least significant bit first, with no padding between them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from graphopt.extras import deferred

if TYPE_CHECKING:
    from graphopt.numerics import kernels_packing as kernels
else:
    kernels = deferred("graphopt.numerics.kernels_packing")

__all__ = ["pack", "packed_size", "unpack", "unpack_shared"]

# packed codes → their number of bits and version, and the codes for as long as somebody holds them
_alive: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_size(numel: int, n_bits: int) -> int:
    """Bytes that `numel` codes of `n_bits` take."""
    return -(-numel * n_bits // 8)


def pack(codes: Tensor, n_bits: int) -> Tensor:
    """Pack codes below `2**n_bits` into bytes.

    Args:
        codes: uint8, any shape, any device.
        n_bits: 1 … 8.

    Returns:
        uint8, [ceil(numel · n_bits / 8)], on the device of `codes`.
    """
    flat = codes.reshape(-1)
    if n_bits == 8:
        return flat.clone()
    packed = np.zeros(packed_size(flat.numel(), n_bits), dtype=np.uint8)
    kernels.pack_bits(np.ascontiguousarray(flat.cpu().numpy()), n_bits, packed)
    return torch.from_numpy(packed).to(codes.device)


def unpack(packed: Tensor, n_bits: int, numel: int) -> Tensor:
    """Inverse of `pack`: uint8, [numel]."""
    if n_bits == 8:
        return packed[:numel]
    if packed.device.type == "cpu":
        codes = np.empty(numel, dtype=np.uint8)
        kernels.unpack_bits(np.ascontiguousarray(packed.numpy()), n_bits, codes)
        return torch.from_numpy(codes)
    # eight codes fill n_bits bytes: gather the 16-bit window of each code and shift
    first = torch.arange(numel, device=packed.device) * n_bits
    at = first // 8
    window = packed[at].to(torch.int32)
    window |= packed[(at + 1).clamp_max(packed.numel() - 1)].to(torch.int32) << 8
    return ((window >> (first % 8)) & (2**n_bits - 1)).to(torch.uint8)


def unpack_shared(packed: Tensor, n_bits: int, shape: Sequence[int]) -> Tensor:
    """Codes as constants: those that another program holds already, where one does.

    A module that was finalized for a target and what is lowered from it have the same codes, which are a byte
    each: they are held once.

    Args:
        packed: What `pack` gave.
        n_bits: 1 … 8.
        shape: Of the codes.

    Returns:
        uint8 of that shape, in memory of its own; not to be written into.
    """
    state = (n_bits, tuple(shape), packed._version)
    known = _alive.get(packed)
    codes = known[1]() if known is not None and known[0] == state else None
    if codes is None:
        codes = unpack(packed, n_bits, math.prod(shape)).reshape(list(shape))
        codes = codes.clone() if n_bits == 8 else codes
        _alive[packed] = state, weakref.ref(codes)
    assert isinstance(codes, Tensor)
    return codes
