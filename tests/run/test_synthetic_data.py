"""Random tokens in place of calibration data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import InputError
from graphopt.ir.captured_module import callable_graph
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.quantization import QuantizerConfig
from graphopt.run.batches import Batch
from graphopt.run.synthetic_data import synthetic_calls, varied_calls


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


FRAMED = torch.tensor([[40, 7, 8, 9, 3, 4, 5, 41, 0, 0], [40, 11, 12, 13, 14, 15, 16, 17, 18, 41]])


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        (FRAMED, [40, 41]),
        (FRAMED[:1], [40, 0]),
        (FRAMED[:1].expand(3, -1), [40, 0]),
        (torch.tensor([[7, 8, 9]]), []),
    ],
    ids=["several", "one", "alike", "short"],
)
def test_tokens_of_every_sequence_stay_where_they_are(ids: Tensor, kept: list[int]) -> None:
    zeros = torch.zeros_like(ids)
    program = graphopt.capture(Words().eval(), (ids, zeros, zeros + 1))
    calls = synthetic_calls(program, sequences=64)
    drawn = torch.stack([call[0] for call in calls])
    stays = torch.isin(ids, torch.tensor(kept, dtype=torch.int64))
    assert bool((drawn == ids)[:, stays].all())
    assert float((drawn == ids)[:, ~stays].float().mean()) < 0.1


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


class Tagger(nn.Module):
    """Tokens of 200, in 16 columns, through two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(200, 16)
        self.fc, self.out = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.out(self.fc(self.words(ids)).relu()) * mask[..., None]


def sentences(distinct: int, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Sentences of ten out of so many tokens."""
    generator = torch.Generator().manual_seed(distinct)
    ids = torch.randint(distinct, (count, 4, 10), generator=generator)
    return [(each, torch.ones(4, 10)) for each in ids]


@pytest.fixture(scope="module")
def tagger() -> graphopt.Program:
    return graphopt.capture(Tagger().eval(), sentences(9)[0])


def test_few_tokens_are_joined_by_random_ones(tagger: graphopt.Program) -> None:
    gm = callable_graph(tagger.graph_module)
    calls: list[Batch] = [(each, {}) for each in sentences(9)]
    made, remark = varied_calls(gm, calls)
    assert len(made) == 12  # 480 tokens are the first multiple of 160 above 24 × 16
    assert "9 distinct tokens for 16 columns" in remark
    assert torch.cat([ids for (ids, _), _ in made]).unique().numel() > 120
    assert all(torch.equal(mask, torch.ones(4, 10)) for (_, mask), _ in made)
    again, _ = varied_calls(gm, calls)
    assert all(torch.equal(a[0][0], b[0][0]) for a, b in zip(made, again, strict=True))
    assert varied_calls(gm, [(each, {}) for each in sentences(100)]) == ([], "")


def test_models_without_tokens_get_none() -> None:
    program = graphopt.capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4),))
    gm = callable_graph(program.graph_module)
    assert varied_calls(gm, [((torch.zeros(2, 4),), {})]) == ([], "")


def test_tables_of_narrow_data_hold_for_other_data(tagger: graphopt.Program) -> None:
    def config(algorithm: str) -> KMeansPalettizerConfig:
        spec = PalettizationSpec(n_bits=2, algorithm=algorithm)
        return KMeansPalettizerConfig(
            global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
        )

    others = sentences(200, count=16)
    module = tagger.module()

    def error(made: nn.Module) -> float:
        with torch.no_grad():
            gaps = [made(*each) - module(*each) for each in others]
        return float(torch.stack(gaps).square().mean())

    plain = error(graphopt.compress(tagger, None, config("kmeans")).module())
    made = graphopt.compress(tagger, None, config("gptq"), sentences(9))
    assert any("random tokens were added" in each for each in made.report().warnings)
    assert error(made.module()) < 0.8 * plain
    palettizer = KMeansPalettizer(tagger, config("gptq"))
    prepared = palettizer.prepare()
    palettizer.calibrate(sentences(9))
    assert error(prepared) == pytest.approx(error(made.module()), rel=1e-4)
    assert any("random tokens" in each for each in palettizer.summary().warnings)
