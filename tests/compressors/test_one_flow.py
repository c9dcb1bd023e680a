"""Compressors, compress and pipelines run one flow: what one does, all do."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import pipelines
from graphopt.compressors.base import Compressor
from graphopt.compressors.options import CompressKeywords, CompressOptions
from graphopt.errors import CalibrationError, InputError, StateError
from graphopt.palettization import (
    DKMPalettizer,
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.passes import FoldBatchNorm, PalettizeWeights
from graphopt.prepared.findings import findings_of
from graphopt.pruning import MagnitudePruner
from graphopt.quantization import (
    ModuleQuantizerConfig,
    Quantizer,
    QuantizerConfig,
)

COMPRESSORS = (KMeansPalettizer, DKMPalettizer, Quantizer, MagnitudePruner)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> graphopt.Program:
    torch.manual_seed(0)
    model = Net().train()
    for _ in range(4):
        model(torch.randn(8, 3, 8, 8))
    return graphopt.capture(model.eval(), (X,))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
DATA = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(4)]


def palettes(algorithm: Any, n_bits: Any = 2) -> KMeansPalettizerConfig:
    spec = PalettizationSpec(n_bits=n_bits, algorithm=algorithm)
    return KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )


def activations_only() -> QuantizerConfig:
    return QuantizerConfig(global_config=ModuleQuantizerConfig(op_state_spec=None))


def same(one: graphopt.CompressedProgram, two: graphopt.CompressedProgram) -> None:
    first, second = (dict(each.module().state_dict()) for each in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(one.module()(X), two.module()(X))
    assert one.report().rows == two.report().rows
    assert one.report().warnings == two.report().warnings


# --- data that an algorithm needs ------------------------------------------------------------------------
def by_compress(net: graphopt.Program, config: KMeansPalettizerConfig) -> object:
    return graphopt.compress(net, None, config)


def by_pipeline(net: graphopt.Program, config: KMeansPalettizerConfig) -> object:
    return pipelines.palettize(config).run(net)


def by_joint_pipeline(net: graphopt.Program, config: KMeansPalettizerConfig) -> object:
    joint = graphopt.JointConfig(palettization=config, quantization=activations_only())
    return pipelines.joint(joint).run(net)


def by_quantizer(net: graphopt.Program, config: KMeansPalettizerConfig) -> object:
    return Quantizer(net, activations_only(), palettization=config).prepare()


@pytest.mark.parametrize("way", [by_compress, by_pipeline, by_joint_pipeline, by_quantizer])
@pytest.mark.parametrize("algorithm", ["skm", "gptq"])
def test_algorithm_without_its_data_is_refused_with_the_weights_and_what_to_give(
    net: graphopt.Program, way: Callable[..., object], algorithm: str
) -> None:
    with pytest.raises(CalibrationError) as caught:
        way(net, palettes(algorithm))
    text = str(caught.value)
    assert f"conv.weight: {algorithm!r} (global_config" in text
    assert f"fc.weight: {algorithm!r} (global_config" in text
    assert "calibration_data=" in text


def test_auto_without_data_is_kmeans(net: graphopt.Program) -> None:
    same(*(graphopt.compress(net, None, palettes(each)) for each in ("auto", "kmeans")))


def test_only_the_weights_that_wait_for_data_are_named(net: graphopt.Program) -> None:
    config = palettes("kmeans")
    config = config.set_module_name("fc", palettes("gptq").global_config)  # type: ignore[arg-type]
    with pytest.raises(
        CalibrationError, match=r"fc\.weight: 'gptq' \(module_name_configs"
    ) as caught:
        graphopt.compress(net, None, config)
    assert "conv.weight" not in str(caught.value)


@pytest.mark.parametrize("algorithm", ["skm", "gptq"])
def test_tables_beside_quantized_activations_are_fitted_to_the_data(
    net: graphopt.Program, algorithm: str
) -> None:
    config = palettes(algorithm)
    quantizer = Quantizer(net, activations_only(), palettization=config)
    quantizer.prepare(calibration_data=DATA)
    quantizer.calibrate(DATA)
    joint = graphopt.JointConfig(palettization=config, quantization=activations_only())
    expected = graphopt.compress(net, None, joint, DATA, correct_statistics=False)
    same(quantizer.program(), expected)
    plain = graphopt.compress(net, None, palettes("kmeans"), fold_batch_norm=True)
    tables = (dict(each.graph_module.named_buffers()) for each in (quantizer.program(), plain))
    fitted, clustered = tables
    assert not torch.equal(fitted["conv.weight_lut"], clustered["conv.weight_lut"])


def test_data_for_tables_that_nobody_asked_for_are_refused(net: graphopt.Program) -> None:
    with pytest.raises(InputError, match="there is none; activations are calibrated by calibrate"):
        Quantizer(net).prepare(calibration_data=DATA)


def test_palettizer_says_what_it_clustered_without_the_data_of_its_algorithm(
    net: graphopt.Program,
) -> None:
    palettizer = KMeansPalettizer(net, palettes("gptq"))
    palettizer.prepare()
    remarks = palettizer.program().report().warnings
    assert [each.split(":")[0] for each in remarks] == ["conv.weight", "fc.weight"]
    assert all("had no data" in each for each in remarks)
    palettizer.calibrate(DATA)
    assert palettizer.program().report().warnings == ()


def test_remarks_of_a_calibration_are_in_the_programs_report() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.cut = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + 0.0 * self.cut(x)

    palettizer = KMeansPalettizer(Half().eval(), palettes("skm"))
    palettizer.prepare((torch.randn(4, 8),))
    palettizer.calibrate([torch.randn(4, 8)])
    (remark,) = palettizer.program().report().warnings
    assert remark == "cut.weight: no gradient reached it; clustered without weights"
    assert palettizer.summary().warnings == (remark,)


# --- one flow, several ways in ---------------------------------------------------------------------------
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("algorithm", ["kmeans", "skm", "gptq"])
def test_palettizer_gives_what_compress_gives(
    net: graphopt.Program, algorithm: str, fold: bool
) -> None:
    palettizer = KMeansPalettizer(net, palettes(algorithm))
    palettizer.prepare(fold_batch_norm=fold)
    palettizer.calibrate(DATA)
    options = {"fold_batch_norm": fold, "correct_statistics": False}
    expected = graphopt.compress(net, None, palettes(algorithm), DATA, **options)  # type: ignore[arg-type]
    same(palettizer.program(), expected)


@pytest.mark.parametrize("config", [QuantizerConfig(), activations_only()])
def test_quantizer_gives_what_compress_gives(
    net: graphopt.Program, config: QuantizerConfig
) -> None:
    quantizer = Quantizer(net, config)
    quantizer.prepare(backend="coreml")
    quantizer.calibrate(DATA)
    expected = graphopt.compress(net, None, config, DATA, backend="coreml")
    same(quantizer.program(), expected)
    assert quantizer.program().report().activations == expected.report().activations


def test_pruner_gives_what_compress_gives(net: graphopt.Program) -> None:
    pruner = MagnitudePruner(net)
    pruner.prepare()
    expected = graphopt.compress(net, None, {"pruning": {}})
    same(pruner.program(), expected)
    assert pruner.summary("coreai").rows == pruner.summary().rows


def test_program_of_a_compressor_reports_every_pass(net: graphopt.Program) -> None:
    palettizer = KMeansPalettizer(net)
    palettizer.prepare()
    report = palettizer.program().pass_report
    assert report is not None
    assert [each.name for each in report] == list(pipelines.palettize().names)


@pytest.mark.coreai
@pytest.mark.parametrize("kind", COMPRESSORS)
def test_forms_of_a_backend_are_raised_by_every_compressor(
    net: graphopt.Program, kind: type[Compressor]
) -> None:
    pytest.importorskip("coreai_torch")
    first = KMeansPalettizer(net, palettes("kmeans").without("fc"))
    first.prepare()
    finalized = first.finalize(backend="coreai")
    assert any("coreai.lut_to_dense" in str(node.target) for node in finalized.graph.nodes)
    compressor = kind(finalized)
    compressor.prepare((X,))
    lookups = [
        str(node.target)
        for node in compressor._waiting().program.graph_module.graph.nodes
        if "lut_to_dense" in str(node.target)
    ]
    assert lookups == ["graphopt.lut_to_dense.default"]


# --- the life cycle ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", COMPRESSORS)
def test_calls_out_of_order_and_wrong_models_are_refused(
    net: graphopt.Program, kind: type[Compressor]
) -> None:
    with pytest.raises(InputError, match="model must be a module, .* got str"):
        kind("net.pt2")  # type: ignore[arg-type]
    compressor = kind(net)
    for call in (compressor.program, compressor.finalize, compressor.summary):
        with pytest.raises(StateError, match="call prepare"):
            call()
    compressor.prepare()
    with pytest.raises(StateError, match=f"called before; make a new {kind.__name__}"):
        compressor.prepare()
    with pytest.raises(InputError, match="must come from prepare.*, got Linear"):
        compressor.program(nn.Linear(2, 2))
    assert kind.compresses.startswith("weights")


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_shapes_of_the_model_stay_open(kind: type[Compressor]) -> None:
    compressor = kind(Net().eval())
    prepared = compressor.prepare((X,))
    assert prepared(torch.randn(5, 3, 12, 10)).shape == (5, 10)


# --- pausing -----------------------------------------------------------------------------------------------
def test_paused_run_takes_results_in_place_of_the_passes_own(net: graphopt.Program) -> None:
    pipeline = pipelines.palettize(palettes("kmeans"))
    paused = pipeline.pause("palettize-weights", net)
    assert not paused.program.table.palettized
    same(paused.finish(), pipeline.run(net))
    four = pipelines.palettize(palettes("kmeans", 4)).pause("palettize-weights", net)
    made = findings_of(four.program.graph_module).stored
    assert set(made) == {"conv.weight", "fc.weight"}
    other = paused.finish(stored=made)
    assert {row.stored_bits for row in other.report()} == {
        row.stored_bits for row in four.finish().report()
    }
    same(paused.finish(), pipeline.run(net))  # a run can go on any number of times


def test_paused_run_goes_on_with_what_was_decided_while_it_waited(net: graphopt.Program) -> None:
    two, four = (pipelines.palettize(palettes("kmeans", bits)) for bits in (2, 4))
    paused = two.pause("annotate-palettization", net)
    same(paused.followed_by(four).finish(), four.run(net))
    with pytest.raises(InputError, match="must begin with what has run"):
        paused.followed_by(pipelines.Pipeline("late", two.passes[1:]))


def test_paused_run_takes_passes_in_place_of_those_that_wait(net: graphopt.Program) -> None:
    paused = pipelines.palettize(palettes("kmeans")).pause("fit-palettes", net)
    with pytest.raises(InputError, match="no pass 'fold-batch-norm' waits"):
        paused.finish(None, FoldBatchNorm())
    with pytest.raises(InputError, match="no pass 'nothing' in pipeline 'palettize'"):
        pipelines.palettize().pause("nothing", net)
    report = paused.finish(None, PalettizeWeights(seed=3)).pass_report
    assert report is not None
    assert [each.name for each in report] == list(paused.pipeline.names)


# --- options -----------------------------------------------------------------------------------------------
def test_keywords_are_the_fields_of_the_options() -> None:
    known = typing.get_type_hints(CompressOptions)
    assert typing.get_type_hints(CompressKeywords) == known
    assert {each.name for each in fields(CompressOptions)} == set(known)


def test_unknown_options_are_refused(net: graphopt.Program) -> None:
    with pytest.raises(TypeError, match="'steps'"):
        graphopt.compress(net, None, None, steps=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'steps'"):
        pipelines.joint(None, DATA, steps=3)  # type: ignore[call-arg]
