from __future__ import annotations

from typing import Any

import pytest
import torch
from search.mixed_precision.nets import encoder, pictures, residual, sentences
from torch import nn

from graphopt.mixed_precision import analyze
from graphopt.search.mixed_precision import batched_candidates
from graphopt.search.mixed_precision.batched_candidates import CandidateBatcher

pytestmark = pytest.mark.usefixtures("one_thread")


class Counter:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.results: list[bool] = []
        original = CandidateBatcher.outputs

        def outputs(this: CandidateBatcher, *args: Any) -> Any:
            found = original(this, *args)
            self.results.append(found is not None)
            return found

        monkeypatch.setattr(CandidateBatcher, "outputs", outputs)


def compared(
    model: nn.Module, data: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[bool]:
    """Analyze side by side and one by one, and say which layers were stacked."""
    counter = Counter(monkeypatch)
    found = analyze(model, (data[0],), [2, 3, 4, "keep"], data, **options)
    engaged = list(counter.results)
    monkeypatch.setattr(batched_candidates, "_ELEMENTS", 0)
    alone = analyze(model, (data[0],), [2, 3, 4, "keep"], data, **options)
    for layer, own in alone.values().items():
        assert found.values()[layer] == pytest.approx(own, abs=1e-3)
    return engaged


def test_candidates_side_by_side_have_the_values_of_single_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert all(compared(residual(), pictures(), monkeypatch))
    monkeypatch.undo()
    assert all(compared(residual(), pictures(), monkeypatch, correction="statistics"))


def test_attention_can_be_stacked_but_not_a_tied_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    engaged = compared(encoder(), sentences(), monkeypatch)
    assert engaged == [True] * 6  # three layers and two batches; the embedding is not asked


class MixesSamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).softmax(0))


def test_ops_across_samples_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    data = [torch.randn(5, 6) for _ in range(2)]
    engaged = compared(MixesSamples().eval(), data, monkeypatch)
    assert engaged == [False, True, True]  # the first layer is asked once


class FixedViews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).reshape(2, -1, 6).transpose(0, 1).mean(1))


def test_graphs_without_the_batch_in_front_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    data = [torch.randn(4, 6)]
    assert compared(FixedViews().eval(), data, monkeypatch) == []
