"""Compiled packing of narrow codes into bytes; all release the GIL."""

from __future__ import annotations

import numpy as np

from graphopt.numerics.compiled import compiled

__all__ = [
    "pack_bits",
    "unpack_bits",
]

_jit = compiled()


@_jit
def pack_bits(index, n_bits, packed):
    """Pack `n_bits`-wide values least significant bit first; `packed` must be zeroed."""
    buffer = np.uint32(0)
    filled = 0
    at = 0
    for i in range(index.size):
        buffer |= np.uint32(index[i]) << np.uint32(filled)
        filled += n_bits
        while filled >= 8:
            packed[at] = np.uint8(buffer & np.uint32(255))
            at += 1
            buffer >>= np.uint32(8)
            filled -= 8
    if filled:
        packed[at] = np.uint8(buffer & np.uint32(255))


@_jit
def unpack_bits(packed, n_bits, index):
    """Inverse of `pack_bits`."""
    buffer = np.uint32(0)
    filled = 0
    at = 0
    mask = np.uint32((1 << n_bits) - 1)
    for i in range(index.size):
        while filled < n_bits:
            buffer |= np.uint32(packed[at]) << np.uint32(filled)
            at += 1
            filled += 8
        index[i] = np.uint8(buffer & mask)
        buffer >>= np.uint32(n_bits)
        filled -= n_bits
