"""Ops of the vocabulary against their formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from graphopt.ir import ops
from graphopt.ir.ops import STORAGE_BITS, lut_to_dense, shift_scale, sparse_to_dense
from graphopt.numerics import row_parts
from graphopt.numerics.packing import pack, unpack


def brute_force(
    codes: Tensor, lut: Tensor, shape: tuple[int, ...], vector_axis: int | None
) -> Tensor:
    dense = torch.empty(shape, dtype=lut.dtype)
    length = lut.shape[-1]
    for place in itertools.product(*map(range, shape)):
        at, element = list(place), 0
        if vector_axis is not None:
            at[vector_axis], element = divmod(place[vector_axis], length)
        tables = [a * n // s for a, n, s in zip(at, lut.shape[:-2], codes.shape, strict=True)]
        dense[place] = lut[(*tables, int(codes[tuple(at)]), element)]
    return dense


@pytest.mark.parametrize(
    ("shape", "tables", "vector_axis", "length"),
    [
        ((6, 4), (1, 1), None, 1),
        ((6, 4), (3, 1), None, 1),
        ((6, 4), (1, 2), None, 1),
        ((6, 4), (3, 2), None, 1),
        ((6, 4, 3), (2, 2, 3), None, 1),
        ((6, 4), (1, 1), 0, 2),
        ((6, 4), (3, 1), 0, 2),
        ((6, 4), (1, 2), 1, 2),
        ((8,), (2,), None, 1),
        ((4, 2, 2, 2), (2, 1, 1, 1), 0, 2),
        ((21, 3), (7, 3), None, 1),
        ((26, 4), (13, 2), 0, 2),
        ((17, 8), (1, 2), 1, 4),
    ],
)
@pytest.mark.parametrize("at_once", [1 << 20, 1])
def test_lookup_follows_its_formula(
    monkeypatch: pytest.MonkeyPatch,
    at_once: int,
    shape: tuple[int, ...],
    tables: tuple[int, ...],
    vector_axis: int | None,
    length: int,
) -> None:
    monkeypatch.setattr(row_parts, "_AT_ONCE", at_once)
    index_shape = [s // length if a == vector_axis else s for a, s in enumerate(shape)]
    codes = torch.randint(0, 8, index_shape, dtype=torch.uint8)
    lut = torch.randn(*tables, 8, length)
    found = lut_to_dense(pack(codes, 3), lut, 3, shape, vector_axis)
    assert torch.equal(found, brute_force(codes, lut, shape, vector_axis))


@pytest.mark.parametrize(
    ("storage", "low", "high"),
    [("int4", -8, 7), ("uint4", 0, 15), ("int8", -128, 127), ("uint6", 0, 63), ("int2", -2, 1)],
)
def test_shift_scale_follows_its_formula(storage: str, low: int, high: int) -> None:
    values = torch.randint(low, high + 1, (4, 6))
    bits = int(storage.strip("uint"))
    data = pack((values % 2**bits).to(torch.uint8), bits)
    scale, offset = torch.rand(2, 3), torch.randint(low, high + 1, (2, 3))
    found = shift_scale(data, scale, offset, storage, [4, 6], torch.float32)
    spread = [t.repeat_interleave(2, 0).repeat_interleave(2, 1) for t in (scale, offset)]
    torch.testing.assert_close(found, spread[0] * (values - spread[1]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_shift_scale_reads_fp8(dtype: torch.dtype) -> None:
    values = torch.randn(3, 4).to(dtype)
    name = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}[dtype]
    data = values.reshape(-1).view(torch.uint8)
    found = shift_scale(data, torch.full((1, 1), 0.5), None, name, [3, 4], torch.float32)
    assert torch.equal(found, values.float() * 0.5)


def test_shift_scale_reads_fp4_with_power_of_two_scales() -> None:
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    scale = torch.tensor([[2.0], [0.25]]).to(torch.float8_e8m0fnu)
    found = shift_scale(pack(codes, 4), scale, None, "fp4_e2m1", [2, 8], torch.float32)
    expected = torch.tensor([[2 * v for v in table], [-0.25 * v for v in table]])
    assert torch.equal(found, expected)


def test_sparse_values_land_where_the_mask_is_set() -> None:
    dense = torch.randn(5, 7) * (torch.rand(5, 7) > 0.6)
    mask = pack((dense != 0).to(torch.uint8), 1)
    assert torch.equal(sparse_to_dense(dense[dense != 0], mask, [5, 7]), dense)


def test_ops_survive_export_and_decomposition() -> None:
    class Lookup(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            codes = torch.randint(0, 16, (8, 4), dtype=torch.uint8)
            self.register_buffer("indices", pack(codes, 4))
            self.register_buffer("lut", torch.randn(1, 1, 16, 1))

        def forward(self, x: Tensor) -> Tensor:
            weight = torch.ops.graphopt.lut_to_dense(self.indices, self.lut, 4, [8, 4])
            return torch.nn.functional.linear(x, weight)

    module, x = Lookup(), torch.randn(2, 4)
    exported = torch.export.export(module, (x,)).run_decompositions()
    targets = [str(node.target) for node in exported.graph.nodes]
    assert "graphopt.lut_to_dense.default" in targets
    assert torch.equal(exported.module()(x), module(x))


def test_fake_implementation_refuses_a_wrong_number_of_bytes() -> None:
    with torch._subclasses.FakeTensorMode():
        indices, lut = torch.empty(5, dtype=torch.uint8), torch.empty(1, 1, 16, 1)
        with pytest.raises(RuntimeError, match="bytes"):
            torch.ops.graphopt.lut_to_dense(indices, lut, 4, [8, 4])


@pytest.mark.parametrize("blocks", [(1, 1), (22, 1), (11, 3), (2, 5), (22, 15)])
@pytest.mark.parametrize("storage", ["int3", "uint5", "int8", "fp8_e4m3", "fp4_e2m1", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_do_not_depend_on_how_many_are_decoded_at_once(
    monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, int], storage: str, dtype: torch.dtype
) -> None:
    shape, generator = (22, 15), torch.Generator().manual_seed(0)
    bits = STORAGE_BITS.get(storage, 8)
    codes = torch.randint(0, min(2**bits, 120), shape, dtype=torch.uint8, generator=generator)
    data = codes.float() if storage == "float" else pack(codes, bits)
    scale = torch.rand(blocks, generator=generator)
    for offset in (None, torch.rand(blocks, generator=generator)):
        whole = shift_scale(data, scale, offset, storage, shape, dtype)
        with monkeypatch.context() as few:
            few.setattr(row_parts, "_AT_ONCE", 1)
            assert torch.equal(whole, shift_scale(data, scale, offset, storage, shape, dtype))


def test_large_weights_are_decoded_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def noted(packed: Tensor, n_bits: int, numel: int) -> Tensor:
        sizes.append(numel)
        return unpack(packed, n_bits, numel)

    monkeypatch.setattr(ops, "unpack", noted)
    codes = torch.randint(0, 16, (3001, 1001), dtype=torch.uint8)
    lut = torch.randn(1, 1, 16, 1)
    found = lut_to_dense(pack(codes, 4), lut, 4, codes.shape)
    assert torch.equal(found, lut.reshape(-1)[codes.long()])
    scale = torch.tensor([[0.5]])
    found = shift_scale(pack(codes, 4), scale, None, "uint4", codes.shape, torch.float32)
    assert torch.equal(found, 0.5 * codes)
    assert max(sizes) <= 1 << 20


def test_gradients_reach_the_tables_of_large_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_parts, "_AT_ONCE", 1)
    codes = torch.tensor([[0, 1], [1, 1], [3, 2], [0, 1]] * 4, dtype=torch.uint8)
    lut = torch.randn(1, 1, 4, 1, requires_grad=True)
    lut_to_dense(pack(codes, 2), lut, 2, (16, 2)).sum().backward()
    assert lut.grad is not None
    assert lut.grad.reshape(-1).tolist() == torch.bincount(codes.reshape(-1).int()).tolist()
