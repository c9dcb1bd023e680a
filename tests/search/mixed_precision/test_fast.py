from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiers import some
from search.mixed_precision.nets import encoder, pictures, residual, sentences
from torch import nn

from graphopt.mixed_precision import analyze
from graphopt.run.batches import as_batch
from graphopt.search.mixed_precision import fast
from graphopt.search.mixed_precision.cross_terms import cross_terms
from graphopt.search.mixed_precision.exact import Bench
from graphopt.search.mixed_precision.fast import draw_vectors
from graphopt.search.mixed_precision.refinement import recipe_evaluator

pytestmark = pytest.mark.usefixtures("one_thread")
CANDIDATES = [2, 4, "int8"]


def bench_of(model: nn.Module, data: list[torch.Tensor], metric: str, **options: Any) -> Bench:
    table = analyze(model, (data[0],), CANDIDATES, data, metric, mode="fast", **options)
    bench = recipe_evaluator(table, data).bench
    return replace(bench, correction=options.get("correction"))


@pytest.mark.parametrize("correction", [None, "statistics"])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_weight_gradients_and_reruns_of_single_ops_agree(
    correction: Any, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ways to ⟨δ, Δz⟩: by the gradient of a group's weight, and by the op's changed output."""
    x = pictures(1)
    bench = bench_of(residual(), x, "kl", correction=correction)
    quick = draw_vectors(bench, as_batch(x[0]), draws=2, seed=3, group=group)
    monkeypatch.setattr(fast, "_is_plain", lambda use: False)
    slow = draw_vectors(bench, as_batch(x[0]), draws=2, seed=3, group=group)
    assert quick.shape == (2 * -(-8 // group), 5 * len(CANDIDATES))
    np.testing.assert_allclose(quick, slow, rtol=2e-3, atol=1e-5 * np.abs(slow).max())


def test_weight_gradients_and_reruns_agree_in_a_transformer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = sentences(1)
    bench = bench_of(encoder(), ids, "mse")
    quick = draw_vectors(bench, as_batch(ids[0]), draws=1, seed=3)
    monkeypatch.setattr(fast, "_is_plain", lambda use: False)
    slow = draw_vectors(bench, as_batch(ids[0]), draws=1, seed=3)
    np.testing.assert_allclose(quick, slow, rtol=2e-3, atol=1e-5 * np.abs(slow).max())


@pytest.mark.integration
@pytest.mark.parametrize(
    "metric", some(["mse", "psnr", "kl", "cosine"], lambda m: m in ("mse", "kl"))
)
def test_predictions_approach_small_measured_losses(metric: str) -> None:
    """Where candidates change little, the second order is all there is; many draws find it."""
    model, x = residual(), pictures()
    measured = analyze(model, (x[0],), [6, 8], x, metric)
    predicted = analyze(
        model, (x[0],), [6, 8], x, metric, mode="fast", draws=200, max_vectors=10**6
    )
    for exact, found in zip(measured.losses(), predicted.losses(), strict=True):
        assert found == pytest.approx(exact, rel=0.2)


def test_predictions_work_where_gradients_are_off() -> None:
    x = pictures(1)
    table = analyze(residual(), (x[0],), [4], x, "kl", mode="fast")
    with torch.no_grad():
        again = analyze(residual(), (x[0],), [4], x, "kl", mode="fast")
    assert again.values() == table.values()


@pytest.mark.integration
def test_groups_of_samples_say_on_average_as_much() -> None:
    model, x = residual(), pictures()
    single = analyze(model, (x[0],), [4], x, "mse", mode="fast", draws=100, max_vectors=10**6)
    grouped = analyze(model, (x[0],), [4], x, "mse", mode="fast", draws=100, max_vectors=400)
    assert grouped.header.group == 6
    for one, other in zip(single.losses(), grouped.losses(), strict=True):
        assert other == pytest.approx(one, rel=0.3)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, (last, _) = self.lstm(x)
        return self.head(last[0])


@pytest.mark.slow
def test_weights_of_ops_with_several_outputs_are_predicted() -> None:
    torch.manual_seed(0)
    model = Recurrent().eval()
    x = [torch.randn(16, 6, 5) for _ in range(2)]
    measured = analyze(model, (x[0],), [6, 8], x, "mse")
    predicted = analyze(model, (x[0],), [6, 8], x, "mse", mode="fast", draws=200, max_vectors=10**6)
    assert measured.layers[0].name.startswith("lstm.weight")
    for exact, found in zip(measured.losses(), predicted.losses(), strict=True):
        assert found == pytest.approx(exact, rel=0.25)


class Linear(nn.Module):
    """Layers whose changes add up exactly: the second order is everything."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 4, bias=False)
        self.b = nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x.flip(-1))


@pytest.mark.integration
@pytest.mark.parametrize("mode", ["fast", "hybrid"])
def test_cross_terms_predict_whole_recipes(mode: Any) -> None:
    torch.manual_seed(0)
    model = Linear().eval()
    model.b.weight.data = model.a.weight.data.flip(-1)  # errors of the two add up in full
    x = [torch.randn(64, 6)]
    table = analyze(model, (x[0],), [1, 2], x, "mse", mode=mode, draws=400, max_vectors=10**6)
    evaluator = recipe_evaluator(table, x)
    for choice in (["1-bit", "1-bit"], ["1-bit", "2-bit"], ["2-bit", "2-bit"]):
        named = dict(zip(("a.weight", "b.weight"), choice, strict=True))
        true = evaluator.loss(choice)
        assert table.predict(named) == pytest.approx(true, rel=0.1)
        if choice[0] == choice[1]:  # cross terms are half of it
            assert true == pytest.approx(
                2 * sum(own[int(choice[0][0]) - 1] for own in table.losses()), rel=0.1
            )


def test_cross_terms_keep_losses_on_the_diagonal() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((50, 4)) * [1.0, 10.0, 0.0, 3.0]
    vectors[:, 3] += 2 * vectors[:, 0]
    q = cross_terms(vectors, [0, 0, 1, 1], [0.5, 2.0, 0.0, 0.5])
    np.testing.assert_allclose(np.diag(q), [1.0, 4.0, 0.0, 1.0], atol=1e-12)
    a, b, _, c = vectors.T
    inside = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert q[0, 1] == pytest.approx(2 * inside)
    between = a @ c / np.linalg.norm(a) / np.linalg.norm(c)
    assert 0.5 * between <= q[0, 3] < between  # shrunk by at most a half


def test_correlations_of_many_vectors_are_kept() -> None:
    generator = np.random.default_rng(0)
    common = generator.standard_normal((200_000, 1))
    vectors = common + generator.standard_normal((200_000, 3))
    q = cross_terms(vectors, [0, 1, 2])
    np.testing.assert_allclose(q, 1 + np.eye(3), rtol=0.02)
    independent = generator.standard_normal((40, 30))
    plain = independent.T @ independent / 40
    shrunk = cross_terms(independent, list(range(30)))
    assert np.abs(shrunk - np.eye(30)).sum() < 0.75 * np.abs(plain - np.eye(30)).sum()


@pytest.mark.integration
def test_ranks_of_trained_candidates_are_those_of_the_measured_ones() -> None:
    from scipy.stats import spearmanr

    model, x = residual(), pictures()
    for metric in ("kl", "psnr"):
        exact = analyze(model, (x[0],), [2, 3, 4, 6], x, metric)
        quick = analyze(model, (x[0],), [2, 3, 4, 6], x, metric, mode="fast", draws=4)
        losses = [[loss for own in table.losses() for loss in own] for table in (exact, quick)]
        assert spearmanr(*losses)[0] > 0.95
