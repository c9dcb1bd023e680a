"""Layers that data or gradients do not reach, and outputs that are masked by -inf."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from helpers.palettized_nets import uniform
from helpers.tiers import cases
from torch import Tensor, nn

import graphopt
from graphopt.mixed_precision import analyze
from graphopt.palettization import PalettizationSpec
from graphopt.search.mixed_precision.metrics import METRICS

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


class Rounded(nn.Module):
    """No gradient gets through to the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second((8 * self.first(x)).round() / 8)


class Experts(nn.Module):
    """Rows go to one of three experts by the sign of their first value; none to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long()
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            result = result.index_add(0, rows, expert(x[rows]))
        return result


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu())
        return y.masked_fill(torch.arange(8) > 5, -float("inf"))


def test_fast_mode_measures_what_no_gradient_reaches(caplog: pytest.LogCaptureFixture) -> None:
    model = Rounded().eval()
    with caplog.at_level(logging.WARNING, "graphopt"):
        fast = analyze(model, (X,), [2, 4], [X], mode="fast")
    exact = analyze(model, (X,), [2, 4], [X], mode="exact")
    assert "no gradient reaches first.weight" in caplog.text
    assert fast.without_gradient == ["first.weight"]
    assert fast.values()["first.weight"] == exact.values()["first.weight"]
    assert all(math.isfinite(value) for value in fast.values()["second.weight"].values())
    cross = fast.interactions()
    assert (cross.diagonal() > 0).all()
    assert 0.5 * cross.diagonal()[0] == pytest.approx(fast.losses()[0][0])


@pytest.mark.parametrize(
    ("metric", "mode"),
    cases(("psnr", "mse", "cosine"), ("exact", "fast"), default=lambda name, _: name == "psnr"),
)
def test_batch_that_misses_a_layer_does_not_count_for_it(mode: str, metric: str) -> None:
    torch.manual_seed(0)
    model, positive, negative = Experts().eval(), X.clone(), X.clone()
    positive[:, 0] = 1.0 + X[:, 0].abs()
    negative[:, 0] = -1.0 - X[:, 0].abs()
    options = {"mode": mode, "metric": metric, "draws": 4}
    both = analyze(model, (X,), [2, 4], [positive, negative], **options)
    alone = analyze(model, (X,), [2, 4], [positive], **options)
    name = "experts.1.weight"
    assert both.values()[name] == pytest.approx(alone.values()[name])
    assert both.missed == ["experts.2.weight"]


@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_masked_outputs_leave_losses_finite(mode: str, metric: str) -> None:
    if mode == "fast" and metric == "top1":
        pytest.skip("the fast mode predicts no shares of equal predictions")
    table = analyze(Masked().eval(), (X,), [2, 4], [X], mode=mode, metric=metric)
    losses = [loss for layer in table.losses() for loss in layer]
    assert all(math.isfinite(loss) for loss in losses)
    assert max(losses) > 0


def test_values_of_masked_outputs_are_those_of_the_rest() -> None:
    torch.manual_seed(0)
    want = torch.randn(6, 8)
    got, masked = want + 0.1, torch.arange(8) > 5
    rest, low = ~masked, -float("inf")
    for name in ("mse", "kl", "cosine", "top1"):
        whole = METRICS[name].compare(got.masked_fill(masked, low), want.masked_fill(masked, low))
        scale = 6 / 8 if name == "mse" else 1
        alone = METRICS[name].compare(got[:, rest], want[:, rest]) * scale
        assert whole == pytest.approx(alone, rel=1e-6, abs=1e-9)
    assert METRICS["mse"].compare(want, want.masked_fill(masked, low)) == math.inf


@pytest.mark.parametrize("algorithm", ["gptq", "skm"])
def test_expert_without_samples_is_clustered_alone_and_named(algorithm: str) -> None:
    model = Experts().eval()
    spec = PalettizationSpec(n_bits=4, algorithm=algorithm)  # type: ignore[arg-type]
    config = uniform(spec)
    made = graphopt.compress(model, (X,), config, calibration_data=[X])
    assert any(each.startswith("experts.2.weight: ") for each in made.report().warnings)
    got, want = made.module()(X), model(X)
    assert float((got - want).norm() / want.norm()) < 0.2
