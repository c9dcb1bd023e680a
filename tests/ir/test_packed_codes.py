"""Codes of a byte each are held packed, and read as plain tensors are."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import Tensor

from graphopt.ir.decoded_tensor import DecodedTensor
from graphopt.ir.packed_codes import packed_of, unpacked
from graphopt.numerics.packing import pack


def _codes(n_bits: int, shape: tuple[int, ...] = (300, 400)) -> Tensor:
    generator = torch.Generator().manual_seed(n_bits)
    return torch.randint(0, 2**n_bits, shape, generator=generator).to(torch.uint8)


@pytest.mark.parametrize("n_bits", range(1, 9))
def test_codes_are_those_that_were_packed_and_take_no_memory_of_their_own(n_bits: int) -> None:
    codes = _codes(n_bits)
    packed = pack(codes, n_bits)
    held = unpacked(packed, n_bits, (300, 400))
    assert isinstance(held, DecodedTensor)
    assert (held.shape, held.stride(), held.dtype) == (codes.shape, codes.stride(), codes.dtype)
    assert torch.equal(held, codes)
    assert np.array_equal(held.detach().cpu().numpy(), codes.numpy())
    assert not held.is_decoded  # arrays are copies
    assert packed_of(held, n_bits) is packed
    assert torch.equal(packed_of(copy.deepcopy(held), n_bits), packed)
    assert torch.equal(packed, pack(codes, n_bits))


def test_an_array_that_is_written_to_changes_no_codes() -> None:
    codes = _codes(4)
    held = unpacked(pack(codes, 4), 4, (300, 400))
    held.numpy()[:] = 0
    assert torch.equal(held, codes)


def test_codes_that_are_written_to_stay_in_their_own_memory() -> None:
    packed = pack(_codes(8), 8)
    held = unpacked(packed, 8, (300, 400))
    before = packed.clone()
    held.zero_()
    assert not held.any()
    assert torch.equal(packed, before)
    assert torch.equal(packed_of(held, 8), torch.zeros(120_000, dtype=torch.uint8))


def test_few_codes_are_a_plain_tensor() -> None:
    packed = pack(_codes(3, (6, 10)), 3)
    assert type(unpacked(packed, 3, (6, 10))) is Tensor
    small = unpacked(pack(_codes(8, (6, 10)), 8), 8, (6, 10))
    assert torch.equal(small, _codes(8, (6, 10)))


def test_other_bits_than_those_that_are_held_are_packed_again() -> None:
    codes = _codes(3)
    held = unpacked(pack(codes, 3), 3, (300, 400))
    assert torch.equal(packed_of(held, 4), pack(codes, 4))
    assert torch.equal(packed_of(codes, 3), pack(codes, 3))


def test_they_are_saved_as_plain_tensors() -> None:
    stream = io.BytesIO()
    torch.save({"codes": unpacked(pack(_codes(4), 4), 4, (300, 400))}, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)["codes"]
    assert type(loaded) is Tensor
    assert torch.equal(loaded, _codes(4))
