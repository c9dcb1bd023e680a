"""Tuning of tables, biases and norms against the uncompressed program."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.compressors.tuning import tune
from graphopt.errors import CalibrationError
from graphopt.ir.program import Program
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity
from graphopt.specs import QuantizationSpec

pytestmark = pytest.mark.usefixtures("one_thread")


BLOCKS: tuple[Literal["auto", "whole"], ...] = ("auto", "whole")


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 24)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.first(x).relu()).relu()))


class CNN(nn.Module):
    """With norms, a residual sum and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm1(self.conv1(x)).relu()
        y = (y + self.norm2(self.conv2(y))).relu()
        y = self.up(y).relu()
        return self.head(y.mean((2, 3))), y


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(20, 8), nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.first(self.embed(ids)).relu().mean(1))


def cnn() -> CNN:
    model = CNN()
    for norm in (model.norm1, model.norm2):
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.3, 1.0)
    return model


def example(kind: str) -> tuple[nn.Module, list[Tensor]]:
    """A model and its data, the same at every call."""
    torch.manual_seed(0)
    if kind == "mlp":
        return MLP().eval(), [torch.randn(16, 8), torch.randn(24, 8), torch.randn(16, 8)]
    if kind == "embedding":
        return Embedded().eval(), [torch.randint(0, 20, (16, 5)) for _ in range(3)]
    return cnn().eval(), [torch.randn(6, 2, 6, 6), torch.randn(4, 2, 6, 6)]


def compressed(
    model: nn.Module, x: Tensor, spec: PalettizationSpec | None = None
) -> tuple[CompressedProgram, Program]:
    """A compressed program and its reference."""
    spec = spec or PalettizationSpec(n_bits=2)
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )
    reference = graphopt.capture(model, (x[:2],))
    palettizer = KMeansPalettizer(reference, config)
    palettizer.prepare(progress=False)
    return palettizer.program(), reference


def outputs(program: Program, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        made = program.graph_module(x)
    return list(made) if isinstance(made, tuple) else [made]


def output_error(program: Program, reference: Program, data: list[Tensor]) -> float:
    """Mean over batches of squared errors, relative to the variance of each output."""
    wanted = [outputs(reference, x) for x in data]
    scales = [
        torch.cat([each.flatten() for each in column]).var() for column in zip(*wanted, strict=True)
    ]
    total = 0.0
    for x, goals in zip(data, wanted, strict=True):
        made = outputs(program, x)
        for mine, goal, scale in zip(made, goals, scales, strict=True):
            total += float((mine - goal).square().mean() / scale)
    return total / len(data)


def changed(program: Program, other: Program) -> set[str]:
    mine, theirs = program.graph_module.state_dict(), other.graph_module.state_dict()
    assert mine.keys() == theirs.keys()
    return {name for name, value in mine.items() if not torch.equal(value, theirs[name])}


# --------------------------------------------------------------------------- what tuning does
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("kind", "share"), [("mlp", 0.92), ("cnn", 0.85), ("embedding", 0.4)])
def test_error_on_the_data_falls(kind: str, share: float, blocks: Literal["auto", "whole"]) -> None:
    model, data = example(kind)
    program, reference = compressed(model, data[0])
    before = output_error(program, reference, data)
    tuned = tune(program, reference, data, steps=150, blocks=blocks, progress=False)
    assert before > 0.01
    assert output_error(tuned, reference, data) < share * before


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_new_data_gain_as_well(kind: str) -> None:
    model, data = example(kind)
    program, reference = compressed(model, data[0])
    seen = [torch.randn(64, *data[0].shape[1:]) for _ in range(4)]
    new = [torch.randn(64, *data[0].shape[1:])]
    tuned = tune(program, reference, seen, steps=150, progress=False)
    before = output_error(program, reference, new)
    assert output_error(tuned, reference, new) < 0.95 * before


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_tables_biases_and_norms_move_and_codes_and_statistics_stay(
    kind: str, blocks: Literal["auto", "whole"]
) -> None:
    model, data = example(kind)
    before_model = copy.deepcopy(model.state_dict())
    program, reference = compressed(model, data[0])
    before, graph = (
        copy.deepcopy(program.graph_module.state_dict()),
        str(program.graph_module.graph),
    )
    tuned = tune(program, reference, data, steps=20, blocks=blocks, progress=False)
    moved = changed(tuned, program)
    assert {name for name in moved if "indices" in name or "running" in name} == set()
    assert {name for name in before if name.endswith("_lut")} <= moved
    assert any(name.startswith("norm") for name in moved)
    assert any(name.endswith("bias") for name in moved)
    assert str(tuned.graph_module.graph) == graph
    assert type(tuned) is type(program)
    for name, value in program.graph_module.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in model.state_dict().items():
        assert torch.equal(value, before_model[name]), name
    assert tuned.report() == program.report()


def test_tuned_program_shares_no_tensor_with_its_arguments() -> None:
    model, data = example("mlp")
    program, reference = compressed(model, data[0])
    tuned = tune(program, reference, data, steps=3, progress=False)
    given = {
        value.data_ptr()
        for each in (program, reference)
        for value in each.graph_module.state_dict().values()
    }
    state = tuned.graph_module.state_dict()
    assert not [name for name, value in state.items() if value.data_ptr() in given]
    assert not any(value.requires_grad for value in tuned.graph_module.buffers())


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_same_seed_gives_the_same_tables(kind: str) -> None:
    model, data = example(kind)
    program, reference = compressed(model, data[0])
    first, second, other = (
        tune(program, reference, data, steps=30, seed=seed, progress=False) for seed in (3, 3, 4)
    )
    assert changed(first, second) == set()
    assert changed(first, other) != set()


def test_the_callers_random_state_and_gradient_mode_do_not_matter() -> None:
    model, data = example("mlp")
    program, reference = compressed(model, data[0])
    first = tune(program, reference, data, steps=5, progress=False)
    torch.manual_seed(77)
    with torch.no_grad():
        second = tune(program, reference, data, steps=5, progress=False)
    assert changed(first, second) == set()


def test_step_too_long_to_help_is_taken_back() -> None:
    model, data = example("mlp")
    program, reference = compressed(model, data[0])
    tuned = tune(
        program, reference, data, steps=3, learning_rate=1e4, blocks="whole", progress=False
    )
    assert changed(tuned, program) == set()


@pytest.mark.parametrize("options", [{"steps": 0}, {"learning_rate": 0.0, "steps": 3}])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_no_steps_change_nothing(options: dict[str, Any], blocks: Literal["auto", "whole"]) -> None:
    model, data = example("cnn")
    program, reference = compressed(model, data[0])
    tuned = tune(program, reference, data, blocks=blocks, progress=False, **options)
    assert changed(tuned, program) == set()
    for mine, theirs in zip(outputs(tuned, data[0]), outputs(program, data[0]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_uncompressed_program_has_nothing_to_tune() -> None:
    model, data = example("mlp")
    reference = graphopt.capture(model, (data[0],))
    tuned = tune(reference, reference, data, steps=3, progress=False)
    assert changed(tuned, reference) == set()


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_there_must_be_data(kind: str) -> None:
    model, data = example(kind)
    program, reference = compressed(model, data[0])
    with pytest.raises(CalibrationError, match="no data"):
        tune(program, reference, [], progress=False)


@pytest.mark.parametrize("form", ["tuple", "list", "keywords"])
def test_data_come_in_any_form_of_one_call(form: str) -> None:
    wrap = {"tuple": lambda x: (x,), "list": lambda x: [x], "keywords": lambda x: {"x": x}}[form]
    model, data = example("mlp")
    program, reference = compressed(model, data[0])
    plain = tune(program, reference, data, steps=3, progress=False)
    wrapped = tune(program, reference, [wrap(x) for x in data], steps=3, progress=False)
    assert changed(wrapped, plain) == set()


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


@pytest.mark.parametrize("name", LAYOUTS)
def test_tuning_computes_with_the_weights_that_the_program_has(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, data = Layered().eval(), [torch.randint(0, 20, (6, 5)) for _ in range(2)]
    program, reference = compressed(model, data[0], LAYOUTS[name])
    assert len(program.report().palettized) == 5
    with caplog.at_level(logging.INFO, logger="graphopt.compressors.tuning"):
        tuned = tune(program, reference, data, steps=12, blocks="whole", progress=False)
    (record,) = [each for each in caplog.records if each.name == "graphopt.compressors.tuning"]
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


@pytest.mark.coreai
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_tuned_program_runs_in_core_ai(kind: str, tmp_path: Path) -> None:
    model, data = example(kind)
    program, reference = compressed(model, data[0])
    tuned = tune(program, reference, data, steps=20, progress=False)
    assert changed(tuned, program) != set()
    artifact = graphopt.lower(tuned, "coreai", precision="float32")
    artifact.save(tmp_path / "net.aimodel")
    outcome = artifact.verify()
    assert outcome.max_error < 1e-4
    assert outcome.weights == len(program.report().palettized)
