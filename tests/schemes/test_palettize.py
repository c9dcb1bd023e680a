from __future__ import annotations

import pytest
import torch

from graphopt.errors import CompressionError
from graphopt.numerics.kmeans1d import cluster_1d
from graphopt.schemes.layout import plan_layout, resolve_group_size
from graphopt.schemes.palettize import palettize
from graphopt.specs import (
    PalettizationSpec,
    PerGroupedChannelGranularity,
    QuantizationScheme,
    QuantizationSpec,
)

SPECS = {
    "default": PalettizationSpec(),
    **{f"{bits} bits": PalettizationSpec(n_bits=bits) for bits in (1, 2, 3, 6, 8)},
    "groups on axis 0": PalettizationSpec(granularity=PerGroupedChannelGranularity(group_size=4)),
    "groups on axis 1": PalettizationSpec(
        granularity=PerGroupedChannelGranularity(axis=1, group_size=2)
    ),
    "vectors": PalettizationSpec(cluster_dim=2),
    "vectors in groups": PalettizationSpec(
        cluster_dim=2, granularity=PerGroupedChannelGranularity(group_size=4)
    ),
    "int8 table": PalettizationSpec(lut_qspec=QuantizationSpec()),
    "uint8 table": PalettizationSpec(
        lut_qspec=QuantizationSpec(dtype=torch.uint8, qscheme=QuantizationScheme.ASYMMETRIC)
    ),
    "fp8 table": PalettizationSpec(lut_qspec=QuantizationSpec(dtype=torch.float8_e4m3fn)),
    "channel scale": PalettizationSpec(enable_per_channel_scale=True),
    "outliers": PalettizationSpec(outlier_fraction=0.01),
    "outliers and channel scale": PalettizationSpec(
        outlier_fraction=0.01, enable_per_channel_scale=True
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_reported_error_is_the_error_of_what_is_stored(name: str, dtype: torch.dtype) -> None:
    weight = (torch.randn(16, 8, 3, 3) * 0.02).to(dtype)
    found = palettize(weight, SPECS[name])
    dense = found.dense()
    assert dense.shape == weight.shape
    assert dense.dtype is dtype
    error = float((weight.double() - dense.double()).square().sum())
    assert found.sse == pytest.approx(error, rel=1e-5)
    assert found.energy == pytest.approx(float(weight.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_dense_weight_holds_no_more_values_than_its_tables(name: str) -> None:
    spec = SPECS[name]
    plain = {"enable_per_channel_scale": False, "cluster_dim": 1, "outlier_fraction": 0.0}
    spec = spec.model_copy(update=plain)
    found = palettize(torch.randn(16, 8, 3, 3), spec)
    groups = found.layout.split(found.dense())
    for group in groups:
        assert group.unique().numel() <= spec.n_entries


def test_every_group_gets_its_own_optimum() -> None:
    weight = torch.randn(12, 5) * torch.logspace(-3, 0, 12)[:, None]
    spec = PalettizationSpec(n_bits=2, granularity=PerGroupedChannelGranularity(group_size=3))
    found = palettize(weight, spec)
    best = cluster_1d(weight.reshape(4, 15), [4], method="exact")[4]
    assert found.sse == pytest.approx(float(best.sse.sum()), rel=1e-4)
    assert list(found.lut.shape) == [4, 1, 4, 1]


def test_output_axis_carries_groups_that_name_no_axis() -> None:
    spec = PalettizationSpec(granularity=PerGroupedChannelGranularity(group_size=2))
    found = palettize(torch.randn(4, 6, 3, 3), spec, output_axis=1)
    assert list(found.lut.shape) == [1, 3, 1, 1, 16, 1]


@pytest.mark.parametrize(
    ("channels", "group_size", "expected"),
    [
        (64, 16, 16),  # divides
        (30522, 16, 6),  # nearest divisor
        (10, 16, 10),  # one group
        (24, 16, 12),
        (5087, 16, 1),  # a prime: single channels
        (7, 4, 7),
    ],
)
def test_group_size_that_does_not_divide_becomes_the_nearest_divisor(
    channels: int, group_size: int, expected: int
) -> None:
    assert resolve_group_size(channels, group_size, 4096, PalettizationSpec()) == expected


def test_fallback_never_makes_tables_larger_than_their_indices() -> None:
    # single channels of 9 weights would need 256 bits of table for 36 bits of indices
    assert resolve_group_size(5087, 16, 9, PalettizationSpec()) == 5087


def test_fallback_is_told() -> None:
    spec = PalettizationSpec(granularity=PerGroupedChannelGranularity(group_size=16))
    assert "group_size 16 does not divide 24" in plan_layout((24, 64), 0, spec).note
    assert plan_layout((32, 64), 0, spec).note == ""


def test_stored_bits_are_those_of_the_tensors() -> None:
    weight = torch.randn(16, 9, dtype=torch.float16)
    found = palettize(weight, PalettizationSpec(n_bits=3))
    assert found.stored_bits() == 16 * 9 * 3 + 8 * 16
    grouped = PalettizationSpec(
        n_bits=2,
        lut_qspec=QuantizationSpec(),
        granularity=PerGroupedChannelGranularity(group_size=4),
    )
    # indices, four tables of four bytes, four scales
    assert palettize(weight, grouped).stored_bits() == 144 * 2 + 4 * 4 * 8 + 4 * 16


def test_quantized_table_is_solved_on_its_grid_not_rounded_afterwards() -> None:
    weight = torch.distributions.Laplace(0.0, 1.0).sample((64, 256))
    solved = palettize(weight, PalettizationSpec(n_bits=6, lut_qspec=QuantizationSpec()))
    plain = palettize(weight, PalettizationSpec(n_bits=6))
    table = plain.lut.flatten()
    step = table.abs().max() / 127
    rounded = (table / step).round() * step
    middle = (rounded[:-1] + rounded[1:]) / 2
    nearest = rounded[torch.bucketize(weight, middle)]
    rounded_error = float((weight - nearest).double().square().sum())
    assert plain.sse < solved.sse < rounded_error


def test_int8_table_entries_are_multiples_of_the_scale() -> None:
    found = palettize(torch.randn(8, 32), PalettizationSpec(lut_qspec=QuantizationSpec()))
    assert found.lut_scale is not None
    levels = found.dense() / found.lut_scale.flatten()[0]
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert levels.abs().max() <= 128


@pytest.mark.parametrize("spec", [PalettizationSpec(), PalettizationSpec(cluster_dim=2)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(spec: PalettizationSpec, bad: float) -> None:
    weight = torch.randn(8, 8)
    weight[3, 3] = bad
    with pytest.raises(CompressionError, match="NaN or Inf"):
        palettize(weight, spec)


@pytest.mark.parametrize("name", ["default", "groups on axis 0", "int8 table", "channel scale"])
def test_constant_weights_survive(name: str) -> None:
    for value in (0.0, 0.75):
        weight = torch.full((8, 8), value)
        dense = palettize(weight, SPECS[name]).dense()
        torch.testing.assert_close(dense, weight, rtol=1e-3, atol=0)


def test_tiny_weights_are_exact() -> None:
    weight = torch.randn(2, 3)
    assert torch.equal(palettize(weight, PalettizationSpec()).dense(), weight)


def test_entry_length_that_does_not_divide_is_refused() -> None:
    with pytest.raises(CompressionError, match="cluster_dim=2 does not divide the 7"):
        palettize(torch.randn(7, 4), PalettizationSpec(cluster_dim=2))


@pytest.mark.integration
def test_vector_tables_are_the_same_for_the_same_seed() -> None:
    weight = torch.randn(32, 32)
    spec = PalettizationSpec(cluster_dim=4, n_bits=4)
    first, second = palettize(weight, spec, seed=3), palettize(weight, spec, seed=3)
    assert torch.equal(first.dense(), second.dense())


def test_vector_tables_beat_scalar_ones_of_the_same_size_on_correlated_weights() -> None:
    base = torch.randn(64, 64)
    weight = base.repeat_interleave(2, 0) + 0.05 * torch.randn(128, 64)
    vectors = palettize(weight, PalettizationSpec(n_bits=4, cluster_dim=2))
    scalars = palettize(weight, PalettizationSpec(n_bits=2))
    assert vectors.sse < 0.5 * scalars.sse


def test_outliers_are_kept_exactly_and_cost_a_mask_and_their_values() -> None:
    weight = torch.randn(32, 64) * 0.02
    weight[3, 5], weight[17, 60] = 3.0, -2.0
    spec = PalettizationSpec(n_bits=4, outlier_fraction=2 / weight.numel())
    found, plain = palettize(weight, spec), palettize(weight, PalettizationSpec(n_bits=4))
    assert found.outliers is not None
    assert found.outliers.numel() == 2
    torch.testing.assert_close(found.dense()[[3, 17], [5, 60]], torch.tensor([3.0, -2.0]))
    # without them, the tables serve the others as if these had never been there
    rest = weight.clone()
    rest[3, 5] = rest[17, 60] = 0.0
    assert found.sse == pytest.approx(palettize(rest, PalettizationSpec(n_bits=4)).sse, rel=0.02)
    assert found.sse < 0.85 * plain.sse  # two of 16 entries are free for the others
    assert found.stored_bits() == plain.stored_bits() + weight.numel() + 2 * 32


def test_importance_decides_which_weights_are_outliers() -> None:
    weight = torch.randn(16, 16)
    importance = torch.ones_like(weight)
    importance[4, 4] = 1e6
    spec = PalettizationSpec(n_bits=2, outlier_fraction=1 / weight.numel())
    found = palettize(weight, spec, importance=importance)
    assert float(found.dense()[4, 4]) == pytest.approx(float(weight[4, 4]), abs=1e-6)


@pytest.mark.parametrize("other", [{"algorithm": "gptq"}, {"cluster_dim": 2}])
def test_outliers_are_refused_where_they_have_no_meaning(other: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="outlier_fraction needs"):
        PalettizationSpec(outlier_fraction=0.01, **other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_no_outliers(value: float) -> None:
    weight = torch.randn(16, 16)
    weight[2, 3] = value
    with pytest.raises(CompressionError, match="NaN or Inf"):
        palettize(weight, PalettizationSpec(outlier_fraction=0.01))
