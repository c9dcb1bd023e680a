"""Palettes fitted to the outputs of a layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from helpers.feedback_problems import objective, second_moment
from torch import Tensor, nn

import graphopt
from graphopt.analysis.matrix_form import WeightUse, weight_uses
from graphopt.analysis.weights import find_weights
from graphopt.fitting.output_loss import OutputLoss
from graphopt.fitting.palettize_outputs import palettize_to_outputs
from graphopt.schemes.palettize import PalettizedWeight, palettize
from graphopt.specs import PalettizationSpec, PerGroupedChannelGranularity, QuantizationSpec

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------- whole weights
class Applied(nn.Module):
    def __init__(self, op: Callable[[Tensor, Tensor], Tensor], weight: Tensor) -> None:
        super().__init__()
        self.op = op
        self.w = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.w)


def smooth(*shape: int) -> Tensor:
    """Correlated along channels (dimension 1) and neighbours, of unequal channel power."""
    x = torch.randn(shape)
    mixer = torch.randn(shape[1], max(shape[1] // 4, 2)) @ torch.randn(
        max(shape[1] // 4, 2), shape[1]
    )
    x = 0.2 * x + torch.einsum("ij,bj...->bi...", mixer, x) / shape[1] ** 0.5
    return x + 0.8 * x.roll(1, -1)


OPS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], Callable[[], Tensor]]] = {
    "linear": (F.linear, (32, 24), lambda: smooth(16, 24, 20).mT),
    "linear of a transpose": (
        lambda x, w: F.linear(x, w.t()),
        (24, 32),
        lambda: smooth(16, 24, 20).mT,
    ),
    "conv": (
        lambda x, w: F.conv2d(x, w, padding=1),
        (32, 8, 3, 3),
        lambda: smooth(4, 8, 12, 12),
    ),
    "grouped conv": (
        lambda x, w: F.conv2d(x, w, groups=2),
        (32, 8, 3, 3),
        lambda: smooth(4, 16, 12, 12),
    ),
    "transposed conv": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2),
        (16, 8, 3, 3),
        lambda: smooth(4, 16, 10, 10),
    ),
}


SPECS = {
    "per tensor": PalettizationSpec(n_bits=3),
    "groups on axis 0": PalettizationSpec(
        n_bits=2, granularity=PerGroupedChannelGranularity(axis=0, group_size=8)
    ),
    "groups on axis 1": PalettizationSpec(
        n_bits=2, granularity=PerGroupedChannelGranularity(axis=1, group_size=4)
    ),
    "pairs": PalettizationSpec(n_bits=4, cluster_dim=2),
    "int8 table": PalettizationSpec(n_bits=3, lut_qspec=QuantizationSpec()),
    "channel scale": PalettizationSpec(n_bits=3, enable_per_channel_scale=True),
}


@cache
def layer(name: str) -> tuple[Tensor, WeightUse, Tensor, Tensor, int]:
    """Weight, its op, its inputs, their second moment, output axis of the weight."""
    op, shape, inputs = OPS[name]
    torch.manual_seed(3)
    model, x = Applied(op, torch.randn(shape)), inputs()
    gm = graphopt.capture(model, (x,), dynamic_shapes=None).graph_module
    (weight,) = find_weights(gm)
    (use,) = weight_uses(gm, [weight])["w"]
    columns = use.form.columns(x.double()).transpose(0, 1).flatten(1, 2)
    hessian = columns.mT @ columns / columns.shape[1]
    return model.w.detach(), use, x, hessian.float(), weight.output_axis


def output_error(name: str, dense: Tensor) -> float:
    weight, _, x, _, _ = layer(name)
    op = OPS[name][0]
    exact, found = op(x.double(), weight.double()), op(x.double(), dense.double())
    return float((exact - found).square().sum() / exact.square().sum())


@pytest.mark.integration
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", OPS)
def test_outputs_come_closer_than_with_kmeans(name: str, spec: str) -> None:
    weight, use, _, hessian, axis = layer(name)
    before, moments = weight.clone(), hessian.clone()
    found = palettize_to_outputs(weight, SPECS[spec], OutputLoss(use, hessian), output_axis=axis)
    assert found is not None
    assert torch.equal(weight, before)
    assert torch.equal(hessian, moments)
    plain = palettize(weight, SPECS[spec], output_axis=axis)
    gain = 10 * math.log10(output_error(name, plain.dense()) / output_error(name, found.dense()))
    assert gain >= (0 if name == "transposed conv" else 2)
    assert found.stored_bits() == plain.stored_bits()
    assert_same_kind(found, plain)


def assert_same_kind(found: PalettizedWeight, plain: PalettizedWeight) -> None:
    """Whatever lowers one stored form lowers the other."""
    assert found.layout == plain.layout
    assert (found.n_bits, found.dtype, found.lut_storage) == (
        plain.n_bits,
        plain.dtype,
        plain.lut_storage,
    )
    for field in ("indices", "lut", "lut_scale", "lut_offset", "channel_scale"):
        one, other = getattr(found, field), getattr(plain, field)
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.shape, one.dtype) == (other.shape, other.dtype), field


@pytest.mark.parametrize("spec", SPECS)
def test_reported_error_is_that_of_the_stored_weight(spec: str) -> None:
    weight, use, _, hessian, axis = layer("linear")
    found = palettize_to_outputs(weight, SPECS[spec], OutputLoss(use, hessian), output_axis=axis)
    assert found is not None
    error = float((weight.double() - found.dense().double()).square().sum())
    assert found.sse == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_keep_their_type_and_gain_as_well(dtype: torch.dtype) -> None:
    weight, use, _, hessian, _ = layer("linear")
    narrow = weight.to(dtype)
    found = palettize_to_outputs(narrow, SPECS["per tensor"], OutputLoss(use, hessian))
    assert found is not None
    plain = palettize(narrow, SPECS["per tensor"])
    assert found.dense().dtype is dtype
    assert_same_kind(found, plain)
    assert output_error("linear", found.dense()) < 0.7 * output_error("linear", plain.dense())


def test_the_same_call_gives_the_same_codes() -> None:
    weight, use, _, hessian, _ = layer("linear")
    spec = SPECS["pairs"]
    one, other = (
        palettize_to_outputs(weight, spec, OutputLoss(use, hessian), seed=4) for _ in range(2)
    )
    assert one is not None
    assert other is not None
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.lut, other.lut)


def test_rows_that_matter_more_err_less() -> None:
    weight, use, _, hessian, _ = layer("linear")
    importance = torch.ones(1, 32)
    importance[0, :4] = 1000.0

    def error(given: Tensor | None) -> float:
        found = palettize_to_outputs(
            weight, PalettizationSpec(n_bits=2), OutputLoss(use, hessian, row_importance=given)
        )
        assert found is not None
        return objective(weight[:4], found.dense()[:4], hessian[0])

    assert error(importance) < 0.9 * error(None)


@pytest.mark.parametrize("seed", range(12))
def test_six_weights_with_two_entries_come_near_the_best_of_all_codes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 6, generator=generator)
    hessian = second_moment(6, 40, seed)
    spec = PalettizationSpec(n_bits=1)
    _, use, *_ = layer("linear")
    found = palettize_to_outputs(
        weight, spec, OutputLoss(use, hessian[None], damping=1e-6), rounds=10
    )
    assert found is not None
    best = math.inf
    h, w = hessian.double(), weight.double()[0]
    lower = torch.linalg.cholesky(h)
    for code in itertools.product([0, 1], repeat=6):
        chosen = torch.tensor(code)
        hot = torch.stack([chosen == 0, chosen == 1], 1).double()
        entries = torch.linalg.lstsq(lower.T @ hot, (lower.T @ w)[:, None], driver="gelsd").solution
        gap = w - (hot @ entries)[:, 0]
        best = min(best, float(gap @ h @ gap))
    reached = objective(weight, found.dense(), hessian)
    assert best * (1 - 1e-5) <= reached <= 1.5 * best


# ---------------------------------------------------------------------------- what has no fit
def use_of(model: nn.Module, x: Tensor, name: str) -> tuple[Tensor, WeightUse, int]:
    gm = graphopt.capture(model, (x,), dynamic_shapes=None).graph_module
    weight = next(each for each in find_weights(gm) if each.name == name)
    return weight.tensor.detach(), weight_uses(gm, [weight])[name][0], weight.output_axis


def no_fit(weight: Tensor, use: WeightUse, axis: int, spec: PalettizationSpec) -> bool:
    groups, _, columns = use.matrix(weight).shape
    hessian = torch.eye(columns).expand(groups, -1, -1)
    return palettize_to_outputs(weight, spec, OutputLoss(use, hessian), output_axis=axis) is None


@pytest.mark.parametrize("axis", [0, 1])
def test_entries_along_either_axis_are_fed_back(axis: int) -> None:
    weight, use, *_ = layer("linear")
    spec = PalettizationSpec(n_bits=2, cluster_dim=2, cluster_axis=axis)
    columns = use.matrix(weight).shape[2]
    x = torch.randn(64, columns, generator=torch.Generator().manual_seed(0))
    x = x @ torch.randn(columns, columns, generator=torch.Generator().manual_seed(1))
    hessian = (x.T @ x / 64)[None]

    def error(palettized: PalettizedWeight) -> float:
        gap = weight - palettized.dense()
        return float(((gap @ hessian[0]) * gap).sum())

    found = palettize_to_outputs(weight, spec, OutputLoss(use, hessian))
    assert found is not None
    assert found.layout.vector_axis == axis
    assert error(found) < 0.8 * error(palettize(weight, spec))


def test_tables_that_cut_through_the_groups_of_a_convolution_have_no_fit() -> None:
    def spec(size: int) -> PalettizationSpec:
        granularity = PerGroupedChannelGranularity(axis=0, group_size=size)
        return PalettizationSpec(n_bits=2, granularity=granularity)

    model = nn.ConvTranspose2d(12, 6, 2, groups=3)
    given = use_of(model, torch.randn(2, 12, 4, 4), "weight")
    assert no_fit(*given, spec(6))
    assert not no_fit(*given, spec(2))
    assert not no_fit(*given, spec(12))


def test_entries_that_reach_into_two_groups_have_no_fit() -> None:
    model = nn.Conv2d(4, 4, 3, groups=4)
    given = use_of(model, torch.randn(2, 4, 5, 5), "weight")
    assert no_fit(*given, PalettizationSpec(n_bits=2, cluster_dim=2))
    assert not no_fit(*given, PalettizationSpec(n_bits=2))


def test_a_part_of_a_fused_weight_has_no_fit() -> None:
    def fused(x: Tensor, w: Tensor) -> Tensor:
        first, second = w.split([8, 4])
        return F.linear(x, first).sum(-1) + F.linear(x, second).sum(-1)

    given = use_of(Applied(fused, torch.randn(12, 6)), torch.randn(2, 6), "w")
    assert no_fit(*given, PalettizationSpec(n_bits=2))
