from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import graphopt
from graphopt.analysis.matrix_form import WeightUse, weight_uses
from graphopt.analysis.weights import find_weights
from graphopt.fitting.scales_by_rate import scales_by_rate
from graphopt.numerics.affine import dequantize, grid_of, quantize
from graphopt.numerics.blocks import Blocks
from graphopt.schemes.palettize import palettize
from graphopt.schemes.quantize import quantize_weight
from graphopt.schemes.sizes import entropy
from graphopt.specs import PalettizationSpec, PerChannelGranularity, QuantizationSpec

INT8 = QuantizationSpec(dtype="int8", granularity=PerChannelGranularity())
ASYMMETRIC = QuantizationSpec(
    dtype="int8", granularity=PerChannelGranularity(), qscheme="asymmetric"
)


@pytest.fixture(name="use", scope="module")
def _use() -> WeightUse:
    program = graphopt.capture(nn.Linear(64, 16, bias=False), (torch.randn(2, 64),))
    (weight,) = find_weights(program.graph_module)
    return weight_uses(program.graph_module, [weight])[weight.name][0]


def weight(spread: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    found = torch.distributions.Laplace(0.0, 1.0).icdf(torch.rand(16, 64, generator=generator))
    return found if spread is None else found * spread[:, None]


def test_entropy_is_that_of_the_frequencies() -> None:
    counts = torch.tensor([5, 0, 11, 1, 64])
    expected = stats.entropy(np.array([5, 0, 11, 1, 64]), base=2) * 81
    assert entropy(counts) == pytest.approx(expected)
    assert entropy(torch.tensor([0, 7])) == 0
    assert entropy(torch.zeros(3)) == 0


def test_coded_bits_count_scales_as_stored_and_elements_by_their_entropy() -> None:
    w = weight()
    form = quantize_weight(w, INT8, Blocks.along(w.shape, 0, 1))
    elements = (form.dense() / form.scale).round().int() + 128
    counts = torch.bincount(elements.reshape(-1), minlength=256)
    assert form.coded_bits() == pytest.approx(entropy(counts) + 16 * 32)
    assert form.coded_bits() < form.stored_bits()


def test_zero_points_do_not_spread_the_symbols() -> None:
    """Rows that differ by a shift alone are coded like one row."""
    row = torch.linspace(-1, 1, 33).repeat(4)
    w = row + torch.tensor([0.0, 0.25, -0.5, 0.75])[:, None]
    scale = torch.full((4, 1), 1 / 16)
    zero = -(torch.tensor([0.0, 4.0, -8.0, 12.0])[:, None])
    form = quantize_weight(w, ASYMMETRIC, Blocks.along(w.shape, 0, 1), fixed=(scale, zero))
    shifted = ((w - w.mean(1, keepdim=True)) * 16).round()
    _, counts = (shifted + zero * 0).unique(return_counts=True)
    assert form.coded_bits() <= entropy(counts) + 132 * 4 + 4 * (32 + 8) + 1e-6


def test_coded_bits_of_palettes_count_their_tables() -> None:
    w = weight()
    form = palettize(w, PalettizationSpec(n_bits=4), output_axis=0)
    _, counts = form.dense().unique(return_counts=True)
    assert form.coded_bits() == pytest.approx(entropy(counts) + 16 * 32)


def rate_and_loss(
    w: Tensor, spec: QuantizationSpec, scale: Tensor, offset: Tensor | None
) -> tuple[float, float]:
    codes = quantize(w, scale, offset, grid_of(spec))
    moved = codes if offset is None else codes - offset
    _, counts = moved.unique(return_counts=True)
    error = (w - dequantize(codes, scale, offset)).double().square().sum()
    return entropy(counts), 0.5 * float(error)


@pytest.mark.parametrize("spec", [INT8, ASYMMETRIC], ids=["symmetric", "zero points"])
def test_larger_rate_weights_take_fewer_bits(use: WeightUse, spec: QuantizationSpec) -> None:
    w, blocks = weight(), Blocks.along((16, 64), 0, 1)
    rates, losses = [], []
    for rate_weight in (1e-5, 1e-3, 1e-2, 1e-1):
        scales = scales_by_rate(w, spec, blocks, use, torch.eye(64)[None], rate_weight, None)
        rate, loss = rate_and_loss(w, spec, *scales)
        rates.append(rate)
        losses.append(loss)
    assert rates == sorted(rates, reverse=True)
    assert losses == sorted(losses)
    assert rates[0] / w.numel() > 5 > 2.5 > rates[-1] / w.numel()


@pytest.mark.parametrize("rate_weight", [1e-3, 1e-2, 1e-1])
def test_no_common_step_is_better_than_the_scales_found(use: WeightUse, rate_weight: float) -> None:
    w = weight(torch.logspace(-1, 0.5, 16))
    blocks, hessian = Blocks.along((16, 64), 0, 1), torch.eye(64)[None]
    rate, loss = rate_and_loss(
        w, INT8, *scales_by_rate(w, INT8, blocks, use, hessian, rate_weight, None)
    )
    own = w.abs().amax(1, keepdim=True) / 127
    for step in torch.logspace(-0.5, 2.2, 40):
        other_rate, other_loss = rate_and_loss(w, INT8, own * step, None)
        assert loss + rate_weight * rate <= 1.01 * (other_loss + rate_weight * other_rate)


def test_slope_is_the_rate_weight(use: WeightUse) -> None:
    """Two choices near each other trade loss for bits at about λ."""
    w, blocks, hessian = weight(), Blocks.along((16, 64), 0, 1), torch.eye(64)[None]
    low, high = (
        rate_and_loss(w, INT8, *scales_by_rate(w, INT8, blocks, use, hessian, each, None))
        for each in (1e-2, 4e-2)
    )
    slope = (high[1] - low[1]) / (low[0] - high[0])
    assert 1e-2 < slope < 4e-2


def test_rows_that_matter_more_get_finer_steps(use: WeightUse) -> None:
    w, blocks = weight(), Blocks.along((16, 64), 0, 1)
    importance = torch.cat([torch.full((8,), 100.0), torch.ones(8)])
    scale, _ = scales_by_rate(w, INT8, blocks, use, torch.eye(64)[None], 1e-2, importance)
    relative = scale[:, 0] / w.abs().amax(1)
    assert float(relative[:8].mean()) < 0.4 * float(relative[8:].mean())
