"""Random tokens in place of calibration data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import InputError
from graphopt.quantization import QuantizerConfig
from graphopt.run.synthetic_data import synthetic_calls


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(50, 8), nn.Embedding(2, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, ids: Tensor, kinds: Tensor, mask: Tensor) -> Tensor:
        hidden = self.words(ids.reshape(ids.shape)) + self.kinds(kinds)
        return self.fc(hidden * mask[..., None].to(hidden.dtype))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
ONES = torch.ones_like(IDS)


def test_tokens_come_from_their_table_and_other_inputs_stay() -> None:
    program = graphopt.capture(Words().eval(), (IDS, 0 * IDS), {"mask": ONES})
    calls = synthetic_calls(program, sequences=40, seed=3)
    assert len(calls) == 20
    ids = torch.cat([call["ids"] for call in calls])
    assert ids.dtype == torch.int64
    assert 0 <= int(ids.min()) < 5
    assert 45 <= int(ids.max()) < 50
    assert all(torch.equal(call["mask"], ONES) for call in calls)
    assert all(torch.equal(call["kinds"], 0 * IDS) for call in calls)
    again = synthetic_calls(program, sequences=40, seed=3)
    assert all(torch.equal(a["ids"], b["ids"]) for a, b in zip(calls, again, strict=True))


def test_report_says_that_there_were_no_data() -> None:
    config = QuantizerConfig.presets.w8a8()
    program = graphopt.compress(Words().eval(), (IDS, 0 * IDS, ONES), config, "synthetic")
    table = program.report()
    assert any("random tokens" in warning for warning in table.warnings)
    assert any(record.status == "quantized" for record in table.activations)


@pytest.mark.parametrize(
    ("model", "example"),
    [(nn.Linear(4, 4), torch.randn(2, 4)), (nn.Embedding(3, 4), torch.tensor([[0, 1]]))],
    ids=["floats", "a table of few rows"],
)
def test_other_models_are_refused(model: nn.Module, example: Tensor) -> None:
    with pytest.raises(InputError, match="no synthetic data"):
        graphopt.compress(model.eval(), (example,), QuantizerConfig(), "synthetic")


def test_other_words_are_refused() -> None:
    with pytest.raises(InputError, match="list of calls"):
        graphopt.compress(nn.Linear(4, 4), (torch.randn(2, 4),), QuantizerConfig(), "random")
