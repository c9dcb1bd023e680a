"""What decides whether tuning counts: batches that are held out, and how far they agree."""

from __future__ import annotations

import pytest
import torch

from graphopt.compressors.calls import CalibrationCalls
from graphopt.compressors.options import CompressOptions
from graphopt.fitting.tuning import held_out_of, safe_change


def test_few_batches_hold_out_as_many_as_show_a_spread() -> None:
    assert [held_out_of(count) for count in (1, 3, 4, 9, 12, 32, 80)] == [0, 0, 2, 3, 4, 4, 10]


@pytest.mark.parametrize("count", [2, 5, 9, 40])
def test_calls_are_split_without_loss_by_the_seed(count: int) -> None:
    how = CompressOptions(tune_steps=1, seed=3)
    parts = CalibrationCalls.of(list(range(count)), how)
    assert sorted(parts.every) == list(range(count))
    assert len(parts.held_out) == held_out_of(count)
    assert sorted(parts.fitted) == (list(range(count)) if count < 32 else sorted(parts.learned))
    assert parts == CalibrationCalls.of(list(range(count)), how)


def test_gain_of_one_batch_beside_losses_of_others_does_not_count() -> None:
    before = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    assert safe_change(before * torch.tensor([0.5, 1.02, 1.02]), before) > 0
    assert safe_change(before * torch.tensor([0.9, 0.92, 0.91]), before) < 0


def test_batch_of_large_errors_decides_no_more_than_others() -> None:
    before = torch.tensor([1e-6, 1.0, 1e-6], dtype=torch.float64)
    assert safe_change(before * torch.tensor([1.2, 0.5, 1.2]), before) > 0


def test_change_of_one_batch_is_its_own() -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert safe_change(0.5 * one, one) == -0.5
