"""Codes packed without padding, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphopt.numerics.packing import pack, packed_size, unpack


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
