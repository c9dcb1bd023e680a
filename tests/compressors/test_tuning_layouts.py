"""Tuning of every layout of tables and of layers that run twice, fold norms or recur."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import pytest
import torch
from helpers.tuned_nets import BLOCKS, changed, compressed, example, output_error, outputs
from torch import Tensor, nn

import graphopt
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity
from graphopt.passes.tune import tune
from graphopt.specs import QuantizationSpec

pytestmark = pytest.mark.usefixtures("one_thread")

# --------------------------------------------------------------------------- layouts of tables
LAYOUTS = {
    "one table": PalettizationSpec(n_bits=3),
    "groups of rows": PalettizationSpec(
        n_bits=2, granularity=PerGroupedChannelGranularity(axis=0, group_size=2)
    ),
    "groups of columns": PalettizationSpec(
        n_bits=2, granularity=PerGroupedChannelGranularity(axis=1, group_size=2)
    ),
    "vectors": PalettizationSpec(n_bits=2, cluster_dim=2),
    "vectors in groups of columns": PalettizationSpec(
        n_bits=2, cluster_dim=2, granularity=PerGroupedChannelGranularity(axis=1, group_size=4)
    ),
    "channel scales": PalettizationSpec(n_bits=2, enable_per_channel_scale=True),
    "quantized tables": PalettizationSpec(n_bits=2, lut_qspec=QuantizationSpec()),
}


class Layered(nn.Module):
    """Each kind of op that reads a table; sizes that every layout divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(20, 8), nn.Linear(8, 12)
        self.conv, self.up = nn.Conv1d(12, 8, 3, padding=1), nn.ConvTranspose1d(8, 8, 2, 2)
        self.right = nn.Parameter(torch.randn(8, 4))

    def forward(self, ids: Tensor) -> Tensor:
        y = self.conv(self.fc(self.embed(ids)).relu().transpose(1, 2)).relu()
        return self.up(y).relu().mean(2) @ self.right


@pytest.mark.integration
@pytest.mark.parametrize("name", LAYOUTS)
def test_tuning_computes_with_the_weights_that_the_program_has(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, data = Layered().eval(), [torch.randint(0, 20, (6, 5)) for _ in range(2)]
    program, reference = compressed(model, data[0], LAYOUTS[name])
    assert len(program.report().palettized) == 5
    with caplog.at_level(logging.INFO, logger="graphopt.fitting.tuning"):
        tuned = tune(program, reference, data, steps=12, blocks="whole", progress=False)
    (record,) = [each for each in caplog.records if each.name == "graphopt.fitting.tuning"]
    assert isinstance(record.args, tuple)
    _, before, after = record.args
    # what the tuning saw is what the programs compute on their own
    assert before == pytest.approx(output_error(program, reference, data), rel=1e-4)
    assert after == pytest.approx(output_error(tuned, reference, data), rel=1e-4)
    assert after < before
    moved = changed(tuned, program)
    assert not any("indices" in each for each in moved)
    if name != "quantized tables":
        assert {
            each for each in program.graph_module.state_dict() if each.endswith("_lut")
        } <= moved


@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - {"quantized tables"}))
def test_first_step_goes_down_the_slope_of_every_entry(name: str) -> None:
    """The loss of one linear layer is quadratic in its entries: differences give its slope."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 12)).eval(), torch.randn(32, 8)
    program, reference = compressed(model, x, LAYOUTS[name])
    state = program.graph_module.state_dict()
    wanted, lut = outputs(reference, x)[0], state["0.weight_lut"]
    probe = program.module()
    slope = torch.zeros_like(lut)
    for place in range(lut.numel()):
        ends = []
        for shift in (0.1, -0.1):
            entries = lut.clone()
            entries.view(-1)[place] += shift
            probe.get_submodule("0")._buffers["weight_lut"] = entries
            with torch.no_grad():
                ends.append(float((probe(x) - wanted).square().mean()))
        slope.view(-1)[place] = ends[0] - ends[1]
    tuned = tune(
        program, reference, [x], steps=1, learning_rate=1e-3, blocks="whole", progress=False
    )
    change = tuned.graph_module.state_dict()["0.weight_lut"] - lut
    steep = slope.abs() > 1e-2 * slope.abs().max()
    assert int(steep.sum()) > lut.numel() // 2
    assert torch.equal(change.sign()[steep], -slope.sign()[steep])


# --------------------------------------------------------------------------- graphs
class Unrolled(nn.Module):
    """One layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.again(self.first(x).relu()).relu()
        return self.head(self.again(y).relu())


@pytest.mark.parametrize("blocks", BLOCKS)
def test_layer_that_runs_twice_is_tuned_for_both(blocks: Literal["auto", "whole"]) -> None:
    torch.manual_seed(0)
    model, data = Unrolled().eval(), [torch.randn(32, 8) for _ in range(2)]
    program, reference = compressed(model, data[0])
    before = output_error(program, reference, data)
    tuned = tune(program, reference, data, steps=150, blocks=blocks, progress=False)
    assert output_error(tuned, reference, data) < 0.9 * before


def test_folded_norms_are_tuned_against_the_norms_of_the_reference() -> None:
    """Convolutions of the two graphs then have one name and different outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    ).eval()
    for norm in (model[1], model[3]):
        norm.running_mean.normal_(0, 0.5)
        norm.running_var.uniform_(0.05, 0.1)
    data = [torch.randn(8, 2, 8, 8) for _ in range(2)]
    reference = graphopt.capture(model, (data[0],))
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(
            op_state_spec={"weight": PalettizationSpec(n_bits=2)}
        )
    )
    palettizer = KMeansPalettizer(reference, config)
    palettizer.prepare(progress=False, fold_batch_norm=True)
    program = palettizer.program()
    before = output_error(program, reference, data)
    tuned = tune(program, reference, data, steps=40, progress=False)
    assert output_error(tuned, reference, data) <= before


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (h, _) = self.lstm(x)
        return self.head(y).relu(), h


@pytest.mark.integration
@pytest.mark.parametrize("blocks", BLOCKS)
def test_recurrent_layers_are_tuned(blocks: Literal["auto", "whole"]) -> None:
    torch.manual_seed(0)
    model, data = Recurrent().eval(), [torch.randn(8, 5, 6) for _ in range(2)]
    program, reference = compressed(model, data[0])
    before = output_error(program, reference, data)
    tuned = tune(program, reference, data, steps=30, blocks=blocks, progress=False)
    assert output_error(tuned, reference, data) < 0.8 * before


def test_half_precision_programs_keep_their_type() -> None:
    model, data = example("mlp")
    data = [x.half() for x in data]
    program, reference = compressed(model.half(), data[0])
    tuned = tune(program, reference, data, steps=20, progress=False)
    for name, value in tuned.graph_module.state_dict().items():
        assert value.dtype is program.graph_module.state_dict()[name].dtype, name
        assert not value.is_floating_point() or bool(value.isfinite().all()), name
    assert output_error(tuned, reference, data) < output_error(program, reference, data)


@pytest.mark.integration
@pytest.mark.coreai
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_tuned_program_runs_in_core_ai(kind: str, tmp_path: Path) -> None:
    model, data = example(kind)
    program, reference = compressed(model, data[0])
    tuned = tune(program, reference, data, steps=20, progress=False)
    assert changed(tuned, program) != set()
    artifact = graphopt.lower(tuned, "coreai", precision="float32")
    artifact.save(tmp_path / "net.aimodel")
    outcome = artifact.verification
    assert outcome.max_error < 1e-4
    assert outcome.weights == len(program.report().palettized)
