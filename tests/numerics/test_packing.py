"""Codes packed without padding, against numpy."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from graphopt.numerics.packing import pack, packed_size, unpack, unpack_shared


@pytest.mark.parametrize("n_bits", range(1, 9))
@pytest.mark.parametrize("numel", [1, 7, 8, 1001])
def test_packing_is_lossless_and_has_no_padding_between_codes(n_bits: int, numel: int) -> None:
    codes = torch.randint(0, 2**n_bits, (numel,), dtype=torch.uint8)
    packed = pack(codes, n_bits)
    assert packed.numel() == packed_size(numel, n_bits) == (numel * n_bits + 7) // 8
    assert torch.equal(unpack(packed, n_bits, numel), codes)
    # numpy's own bit packing, least significant bit first, is the reference
    bits = np.unpackbits(codes.numpy()[:, None], axis=1, bitorder="little")[:, :n_bits]
    assert packed.tolist() == np.packbits(bits.reshape(-1), bitorder="little").tolist()


def test_codes_are_held_once_for_as_long_as_somebody_holds_them() -> None:
    codes = torch.randint(0, 8, (6, 10), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(codes, 3)
    first = unpack_shared(packed, 3, (6, 10))
    assert torch.equal(first, codes)
    assert unpack_shared(packed, 3, (6, 10)) is first
    assert unpack_shared(packed, 3, (10, 6)).shape == (10, 6)
    packed.zero_()
    assert not unpack_shared(packed, 3, (6, 10)).any()
    assert torch.equal(first, codes)
    place = weakref.ref(first)
    del first
    assert place() is None


def test_bytes_that_are_their_own_codes_are_copied() -> None:
    packed = torch.arange(12, dtype=torch.uint8)
    codes = unpack_shared(packed, 8, (3, 4))
    assert torch.equal(codes.reshape(-1), packed)
    assert codes.untyped_storage().data_ptr() != packed.untyped_storage().data_ptr()
