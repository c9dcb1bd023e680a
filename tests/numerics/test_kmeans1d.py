from __future__ import annotations

import kmeans1d
import numpy as np
import pytest
import torch
from helpers.tiers import cases
from torch import Tensor

from graphopt.errors import CompressionError
from graphopt.numerics.kmeans1d import Clustering, IntGrid, assign_1d, cluster_1d
from graphopt.numerics.kmeans1d_device import cluster_on_device


def optimum(values: Tensor, k: int) -> float:
    """Sum of squared errors of the exact optimum, by an independent implementation."""
    x = values.double().tolist()
    clusters, centroids = kmeans1d.cluster(x, k)
    return sum((v - centroids[c]) ** 2 for v, c in zip(x, clusters, strict=True))


def sse(values: Tensor, found: Clustering) -> float:
    return float((values.double() - found.dense().double()).square().sum())


def laplace(n: int) -> Tensor:
    return torch.distributions.Laplace(0.0, 1.0).sample((n,))


DISTRIBUTIONS = {
    "normal": lambda n: torch.randn(n),
    "laplace": laplace,
    "heavy tails": lambda n: torch.distributions.StudentT(2.0).sample((n,)),
    "uniform": lambda n: torch.rand(n),
    "two modes": lambda n: torch.cat([torch.randn(n // 2) - 9, torch.randn(n - n // 2) * 0.1]),
    "one outlier": lambda n: torch.cat([torch.randn(n - 1), torch.tensor([1e4])]),
    "offset": lambda n: torch.randn(n) * 1e-3 + 1.0,
    "few distinct": lambda n: torch.randint(0, 9, (n,)).float(),
}


@pytest.mark.parametrize("k", [2, 4, 16, 64])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_error_is_within_a_thousandth_of_the_exact_optimum(name: str, k: int) -> None:
    values = DISTRIBUTIONS[name](3000)
    found = cluster_1d(values[None], [k])[k]
    # float32 tables cannot be more exact than their own rounding
    rounding = 3000 * float(values.abs().max() * 2.0**-24) ** 2
    assert sse(values[None], found) <= 1.001 * optimum(values, k) + rounding


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "k"),
    cases(
        ["normal", "heavy tails", "two modes", "one outlier"],
        [16, 64, 256],
        default=lambda name, k: k < 256 or name == "heavy tails",
    ),
)
def test_long_groups_come_as_close_through_their_histogram(name: str, k: int) -> None:
    values = DISTRIBUTIONS[name](300_000)[None]
    fast = cluster_1d(values, [k])[k]
    exact = cluster_1d(values, [k], method="exact")[k]
    assert float(fast.sse.sum()) <= 1.001 * float(exact.sse.sum())


def test_exact_method_is_the_optimum() -> None:
    values = laplace(1500)
    for k in (3, 8, 31):
        found = cluster_1d(values[None], [k], method="exact")[k]
        assert sse(values[None], found) == pytest.approx(optimum(values, k), rel=1e-6)


def test_several_table_sizes_cost_one_call_and_equal_the_single_ones() -> None:
    values = torch.randn(5, 700)
    together = cluster_1d(values, [4, 16, 64])
    for k, found in together.items():
        alone = cluster_1d(values, [k])[k]
        assert float(found.sse.sum()) == pytest.approx(float(alone.sse.sum()), rel=1e-3)
        assert found.tables.shape == (5, k)


@pytest.mark.parametrize("n", [2000, 300_000])
@pytest.mark.parametrize("exponent", [-40, -12, 0, 20])
def test_scaling_by_a_power_of_two_scales_the_tables_exactly(n: int, exponent: int) -> None:
    values = torch.randn(1, n) * 0.02
    scaled = cluster_1d(values * 2.0**exponent, [16])[16]
    plain = cluster_1d(values, [16])[16]
    torch.testing.assert_close(scaled.tables, plain.tables * 2.0**exponent, rtol=1e-6, atol=0)
    assert (scaled.indices != plain.indices).float().mean() < 1e-4


def test_groups_do_not_influence_each_other() -> None:
    values = torch.randn(40, 300) * torch.logspace(-3, 3, 40)[:, None]
    together = cluster_1d(values, [8])[8]
    for row in (0, 17, 39):
        alone = cluster_1d(values[row : row + 1], [8])[8]
        assert torch.equal(together.tables[row], alone.tables[0])
        assert torch.equal(together.indices[row], alone.indices[0])


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    values = torch.randn(64, 500)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(cluster_1d(values, [16])[16])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(found[0].tables, other.tables)
        assert torch.equal(found[0].indices, other.indices)


def test_indices_name_the_nearest_entry() -> None:
    values = torch.randn(3, 20_000)
    for k in (4, 16, 64, 256):
        found = cluster_1d(values, [k])[k]
        distance = (values[:, :, None] - found.tables[:, None, :]).abs()
        chosen = distance.gather(2, found.indices.long()[..., None])[..., 0]
        torch.testing.assert_close(chosen, distance.amin(2), rtol=0, atol=1e-6)


def test_reported_error_is_the_error_of_the_rounded_tables() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        values = torch.randn(4, 1000).to(dtype)
        found = cluster_1d(values, [16])[16]
        assert found.tables.dtype is dtype
        assert float(found.sse.sum()) == pytest.approx(sse(values, found), rel=1e-9)


def test_weights_move_the_optimum_to_the_weighted_one() -> None:
    values, weights = torch.randn(1, 400), torch.rand(1, 400) ** 4
    found = cluster_1d(values, [8], weights=weights, method="exact")[8]
    # a weight of n is the same as n equal values
    counts = (weights * 50).round()
    weighted = cluster_1d(values, [8], weights=counts, method="exact")[8]
    repeated = values[0].repeat_interleave(counts[0].long())
    assert float(weighted.sse.sum()) == pytest.approx(optimum(repeated, 8), rel=1e-5)
    plain = cluster_1d(values, [8], method="exact")[8]
    error = (values.double() - plain.dense().double()).square() * weights
    ours = (values.double() - found.dense().double()).square() * weights
    assert float(ours.sum()) <= float(error.sum())


@pytest.mark.parametrize("k", [2, 8, 16])
def test_values_that_weigh_nothing_or_repeat_do_not_blur_the_choice(k: int) -> None:
    values = torch.randint(0, 40, (2, 3000)).float()
    weights = (torch.rand(2, 3000) > 0.95).float()
    found = cluster_1d(values, [k], weights=weights)[k].sse
    for row in range(2):
        kept = values[row][weights[row] > 0]
        assert float(found[row]) <= 1.001 * optimum(kept, k) + 1e-9


def test_group_whose_weights_are_all_zero_is_clustered_unweighted() -> None:
    values = torch.randn(2, 300)
    weights = torch.stack([torch.zeros(300), torch.ones(300)])
    found = cluster_1d(values, [8], weights=weights)[8]
    plain = cluster_1d(values, [8])[8]
    torch.testing.assert_close(found.tables, plain.tables, rtol=1e-6, atol=1e-7)


def test_tables_on_an_integer_grid_are_optimal_among_grid_tables() -> None:
    values = torch.randn(200)
    step, low, high = 0.25, -8, 7
    grid = IntGrid(torch.tensor([step], dtype=torch.float64), low, high)
    found = cluster_1d(values[None], [3], grid=grid, method="exact")[3]
    levels = (found.tables / step).round()
    torch.testing.assert_close(levels * step, found.tables, rtol=0, atol=0)
    best = np.inf
    points = np.arange(low, high + 1) * step
    x = values.double().numpy()
    for a in points:
        for b in points[points >= a]:
            for c in points[points >= b]:
                error = np.minimum(np.minimum((x - a) ** 2, (x - b) ** 2), (x - c) ** 2).sum()
                best = min(best, error)
    assert float(found.sse.sum()) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("values", [torch.zeros(1, 7), torch.full((2, 5), -3.25)])
def test_equal_values_are_represented_exactly(values: Tensor) -> None:
    found = cluster_1d(values, [16])[16]
    assert torch.equal(found.dense(), values)


def test_fewer_values_than_entries_are_represented_exactly() -> None:
    values = torch.tensor([[3.0, -1.0, 0.5]])
    assert torch.equal(cluster_1d(values, [16])[16].dense(), values)
    single = torch.tensor([[2.5]])
    assert torch.equal(cluster_1d(single, [256])[256].dense(), single)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    values = torch.randn(1, 10)
    values[0, 3] = bad
    with pytest.raises(CompressionError, match="NaN or Inf"):
        cluster_1d(values, [4])


def test_negative_or_infinite_weights_are_refused() -> None:
    values = torch.randn(1, 4)
    for bad in (-1.0, float("inf")):
        weights = torch.tensor([[1.0, 1.0, 1.0, bad]])
        with pytest.raises(CompressionError, match="sensitivities"):
            cluster_1d(values, [2], weights=weights)


@pytest.mark.parametrize("weighted", [False, True])
def test_device_path_comes_as_close_as_the_compiled_one(weighted: bool) -> None:
    values = torch.distributions.StudentT(3.0).sample((12, 5000))
    weights = torch.rand(12, 5000) if weighted else None
    on_device = cluster_on_device(values, [4, 16], weights, None)
    for k, (_, _, error) in on_device.items():
        exact = cluster_1d(values, [k], weights=weights, method="exact")[k]
        assert float(error.sum()) <= 1.001 * float(exact.sse.sum())


def test_assigning_to_given_tables_finds_the_nearest() -> None:
    values = torch.tensor([[0.1, 0.4, 0.6, 5.0, -2.0]])
    found = assign_1d(values, torch.tensor([[0.0, 0.5, 1.0]]))
    assert found.indices.tolist() == [[0, 1, 1, 2, 0]]
