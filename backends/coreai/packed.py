"""Codes on their way into coreai-torch: packed as they are held, not unpacked for it to pack them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from graphopt.exclusive import patched
from graphopt.ir.decoded_tensor import DecodedTensor
from graphopt.ir.packed_codes import PackedCodes

__all__ = ["packed_codes_taken"]

_ALIGNED = 8  # codes; of as many, both packings end with a whole byte


@contextmanager
def packed_codes_taken() -> Iterator[None]:
    """Let coreai-torch take codes of less than a byte from their packed form, inside `exclusive`.

    Both pack from the least significant bit on. Its own way takes a byte for each code, and several more
    on its way to packed ones.
    """
    from coreai_torch._compression._intx import UintxTensor

    own = UintxTensor.from_unpacked

    def taken(cls: Any, unpacked: Any, nbits: int) -> Any:  # by these names, too
        stored: Any = unpacked.source if isinstance(unpacked, DecodedTensor) else None
        same = isinstance(stored, PackedCodes) and stored.n_bits == nbits
        if not same or unpacked.device.type != "cpu" or unpacked.numel() % _ALIGNED:
            return own(unpacked, nbits)
        return cls(stored.packed, unpacked.shape, nbits)

    with patched(UintxTensor, from_unpacked=classmethod(taken)):
        yield
