"""Searches take batches whose lengths and numbers of samples differ."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import rdo
from graphopt.ir.program import Program
from graphopt.mixed_precision import SensitivityTable, analyze

LENGTHS = [(2, 5), (1, 9), (3, 2), (2, 12)]


class Mixer(nn.Module):
    """Tokens, each mixed with the mean of its sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.first, self.second, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 40)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.second(torch.relu(self.first(x + x.mean(1, keepdim=True))))
        return self.head(x)


def batches() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(0, 40, shape, generator=draw) for shape in LENGTHS]


@cache
def program() -> Program:
    torch.manual_seed(0)
    return graphopt.capture(Mixer().eval(), batches()[0])


def measured(data: list[Tensor], mode: str) -> SensitivityTable:
    return analyze(program(), None, [2, 4], data, "kl", mode=mode, draws=64, progress=False)


def test_sensitivities_are_means_over_batches_of_any_length() -> None:
    table, again = measured(batches(), "exact"), measured(batches()[::-1], "exact")
    predicted = measured(batches(), "fast")
    narrow, wide = table.candidates
    for layer, losses in table.values().items():
        assert losses[narrow] > losses[wide] > 0
        for candidate, loss in losses.items():
            assert loss == pytest.approx(again.values()[layer][candidate], rel=1e-3)
            assert loss / 3 < predicted.values()[layer][candidate] < 3 * loss


def test_rate_distortion_beats_uniform_bits_on_batches_of_any_length() -> None:
    config = {"target_bits": 6.3, "candidates": [2, 4, 6], "rounding": {"steps": 5}, "draws": 1}
    made, report = rdo.optimize(program(), None, batches(), config, progress=False)
    rows = {row.name: row for row in report.comparison}
    best, uniform = rows["rate-distortion"], rows["uniform 4-bit"]
    assert best.bits_per_weight <= 6.3
    assert best.distance < uniform.distance
    with torch.no_grad():
        assert [made.module()(ids).shape[:2] for ids in batches()] == LENGTHS
