"""Bit packing: `n`-bit codes, least significant bit first, with no padding between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from graphopt.extras import deferred

if TYPE_CHECKING:
    from graphopt.numerics import kernels_packing as kernels
else:
    kernels = deferred("graphopt.numerics.kernels_packing")

__all__ = ["pack", "packed_size", "unpack"]


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
