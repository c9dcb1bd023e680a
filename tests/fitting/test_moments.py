"""Second moments of layers' inputs: features far from 0, constant ones, and none at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.palettized_nets import uniform
from torch import nn

import graphopt
from graphopt.analysis.matrix_form import weight_uses
from graphopt.analysis.weights import find_weights
from graphopt.fitting.moments import LayerMoments, Sample, collect_moments
from graphopt.palettization import PalettizationSpec


def use_of(model: nn.Module, x: torch.Tensor) -> Any:
    gm = graphopt.capture(model, (x,)).graph_module
    weights = [weight for weight in find_weights(gm) if weight.tensor.ndim > 1]
    return weight_uses(gm, weights)[weights[0].name][0]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_moments_are_those_of_float64(mean: float, centred: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 300, 6) + mean * torch.tensor([1.0, -1, 0, 2, 0.5, 1])
    y = x + 0.1 * torch.randn_like(x)
    missing = [(y[n, :, :4], x[n, :, :4]) for n in range(2)]
    use = use_of(nn.Linear(6, 4), x[0])
    moments = collect_moments(
        use, list(x), list(y), None, missing, centred=centred, sample=Sample(0)
    )
    assert moments is not None
    flat, exact = x.double().flatten(0, 1), y.double().flatten(0, 1)
    base = flat - flat.mean(0) if centred else flat
    size = flat.shape[0]
    torch.testing.assert_close(
        moments.hessian[0].double(), base.T @ base / size, rtol=1e-4, atol=1e-3
    )
    gap = exact - flat
    limit = {"rtol": 1e-3, "atol": 1e-4 * max(mean, 1)}
    torch.testing.assert_close(moments.shift[0].double(), gap.T @ base / size, **limit)
    rest = gap[:, :4]
    torch.testing.assert_close(moments.beside[0].double(), rest.T @ base / size, **limit)
    torch.testing.assert_close(moments.mean[0], flat.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.wanted[0], exact.mean(0), rtol=1e-6, atol=1e-5)


def test_layer_without_a_sample_has_no_moments() -> None:
    none = [torch.zeros(0, 6)]
    use = use_of(nn.Linear(6, 4), torch.randn(3, 6))
    assert collect_moments(use, none, none, None, None, centred=True, sample=Sample(0)) is None


def test_a_batch_without_samples_does_not_count() -> None:
    x = torch.randn(40, 6)
    use = use_of(nn.Linear(6, 4), x)
    alone = collect_moments(use, [x], [x], None, None, centred=True, sample=Sample(0))
    both = [torch.zeros(0, 6), x]
    beside = collect_moments(use, both, both, None, None, centred=True, sample=Sample(0))
    assert alone is not None
    assert beside is not None
    torch.testing.assert_close(beside.hessian, alone.hessian)


@pytest.mark.parametrize(
    "kind", ["one constant feature", "all far away", "farther away", "normalised digits"]
)
def test_feedback_is_better_than_kmeans_on_any_features(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    if kind == "one constant feature":
        x[:, 0] = 100.1
    elif kind == "normalised digits":
        from sklearn.datasets import load_digits

        x = torch.tensor(load_digits().data[:256], dtype=torch.float32)
        x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    else:
        x = x + (1e3 if kind == "all far away" else 1e5)
    width = x.shape[1]
    model = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    errors = {}
    for algorithm in ("kmeans", "gptq"):
        spec = PalettizationSpec(n_bits=2, algorithm=algorithm)  # type: ignore[arg-type]
        config = uniform(spec)
        made = graphopt.compress(model, (x,), config, calibration_data=[x, x]).module()
        errors[algorithm] = float((made(x) - model(x)).norm())
    assert errors["gptq"] < errors["kmeans"]


@pytest.mark.parametrize("samples", [32, 128, 512, 4096])
@pytest.mark.parametrize(("kind", "share"), [("independent", 0.25), ("correlated", 1.01)])
def test_moments_of_few_samples_are_drawn_to_what_is_sure(
    kind: str, share: float, samples: int
) -> None:
    width, mix = 64, torch.eye(64)
    if kind == "correlated":
        places = torch.arange(width)
        mix = torch.linalg.cholesky(0.8 ** (places[:, None] - places[None]).abs().float())
    use = use_of(nn.Linear(width, 4), torch.randn(1, width))
    raw = drawn = 0.0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(samples, width, generator=generator) @ mix.T
        moments = collect_moments(use, [x], [x], None, None, centred=False, sample=Sample(0))
        assert moments is not None
        assert moments.samples == samples
        raw += float((moments.hessian[0] - mix @ mix.T).norm())
        drawn += float((moments.shrunk().hessian[0] - mix @ mix.T).norm())
    assert drawn < share * raw


def test_moments_that_are_known_exactly_stay() -> None:
    whole, vectors = torch.randn(3, 1, 3, 3), torch.rand(3, 1, 3)
    exact = LayerMoments(whole[0], whole[1], *vectors[:2], whole[2], vectors[2], torch.ones(3, 1))
    for name in ("hessian", "shift", "beside"):
        assert torch.equal(getattr(exact.shrunk(), name), getattr(exact, name))


def test_what_many_samples_show_beside_the_diagonal_stays() -> None:
    x = torch.randn(2048, 16)
    mixed, y = x @ torch.randn(16, 16), x @ torch.randn(16, 4)
    use = use_of(nn.Linear(16, 4), x[:1])
    moments = collect_moments(
        use, [x], [x + mixed], None, [(y, torch.zeros(2048, 4))], centred=False, sample=Sample(0)
    )
    assert moments is not None
    for name in ("shift", "beside"):
        drawn, raw = getattr(moments.shrunk(), name), getattr(moments, name)
        assert float((drawn - raw).norm()) < 0.05 * float(raw.norm())


@pytest.mark.parametrize("samples", [64, 256])
def test_feedback_from_few_samples_is_better_than_kmeans_on_others(samples: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x, others = torch.randn(samples, 64), torch.randn(2048, 64)
    errors = {}
    for algorithm in ("kmeans", "gptq"):
        spec = PalettizationSpec(n_bits=2, algorithm=algorithm)  # type: ignore[arg-type]
        made = graphopt.compress(model, (x,), uniform(spec), calibration_data=[x]).module()
        errors[algorithm] = float((made(others) - model(others)).norm())
    assert errors["gptq"] < errors["kmeans"]
