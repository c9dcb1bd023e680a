from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from graphopt.errors import InputError
from graphopt.search.mixed_precision.metrics import METRICS, as_metric, measure, shown

A = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
B = A + 0.1 * torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
a, b = A.double().numpy(), B.double().numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


EXPECTED = {
    "psnr": 10 * np.log10((a**2).max() / ((a - b) ** 2).mean()),
    "mse": ((a - b) ** 2).mean(),
    "kl": (softmax(a) * np.log(softmax(a) / softmax(b))).sum(-1).mean(),
    "cosine": ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean(),
    "top1": (a.argmax(-1) == b.argmax(-1)).mean(),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_metrics_are_their_formulas(name: str) -> None:
    assert METRICS[name].compare(B, A) == pytest.approx(EXPECTED[name], rel=1e-9)


@pytest.mark.parametrize("name", EXPECTED)
def test_losses_are_zero_for_equal_outputs_and_can_be_turned_back(name: str) -> None:
    metric = METRICS[name]
    assert metric.loss(metric.compare(A, A)) == pytest.approx(0, abs=1e-12)
    value = metric.compare(B, A)
    assert metric.value(metric.loss(value)) == pytest.approx(value)
    assert metric.loss(value) >= 0


def test_decibels_become_noise_that_adds_up() -> None:
    metric = METRICS["psnr"]
    assert metric.loss(20) + metric.loss(20) == pytest.approx(metric.loss(20 - 10 * math.log10(2)))


def test_cosines_become_noise_that_adds_up() -> None:
    metric = METRICS["cosine"]
    generator = torch.Generator().manual_seed(2)
    signal, one, two = torch.randn(3, 50, 2000, generator=generator)
    losses = [
        metric.loss(metric.compare(signal + noise, signal)) for noise in (one, two, one + two)
    ]
    assert losses[2] == pytest.approx(losses[0] + losses[1], rel=0.02)
    assert metric.loss(0.999) == pytest.approx(0.001, rel=0.01)


def test_several_outputs_count_alike_and_integers_not_at_all() -> None:
    values = [METRICS["mse"].compare(B, A), METRICS["mse"].compare(2 * B, A)]
    ids = torch.arange(3)
    found = measure(METRICS["mse"], [B, ids, 2 * B], [A, ids, A])
    assert found == pytest.approx(sum(values) / 2)
    with pytest.raises(InputError, match="no floating-point tensor"):
        measure(METRICS["mse"], [ids], [ids])


def test_a_function_of_ones_own_is_a_metric() -> None:
    def agreement(found: torch.Tensor, reference: torch.Tensor) -> float:
        return float((found > 0).eq(reference > 0).float().mean())

    metric = as_metric(agreement)
    assert (metric.name, metric.larger_is_better) == ("agreement", True)
    assert metric.loss(0.75) == pytest.approx(0.25)

    def distance(found: torch.Tensor, reference: torch.Tensor) -> float:
        return float((found - reference).abs().max())

    distance.larger_is_better = False  # type: ignore[attr-defined]
    assert as_metric(distance).loss(0.75) == pytest.approx(0.75)
    with pytest.raises(InputError, match="no metric 'snr'"):
        as_metric("snr")


def test_decibels_have_their_unit_and_the_same_digits_in_every_row() -> None:
    assert [shown("psnr", value) for value in (61.2, 70.711, 8, math.inf)] == [
        "61.2 dB",
        "70.7 dB",
        "8.0 dB",
        "exact",
    ]
    assert shown("cosine", 0.998877) == "0.9989"
