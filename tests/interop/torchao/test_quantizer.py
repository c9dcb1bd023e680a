"""Our annotations, run by torchao's engine; and models that PT2E has converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiers import some
from helpers.torchao_nets import X, aten, converted, rounding_ops, xnnpack
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    ComposableQuantizer,
)

import graphopt
from graphopt import pipelines
from graphopt.errors import CalibrationError
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.passes import DequantizeWeights
from graphopt.quantization import CalibrateActivations, QuantizerConfig
from graphopt.torchao import GraphOptQuantizer


# --- our annotations, their engine ----------------------------------------------------------------
def unrounded_calibration(pipeline: pipelines.Pipeline, data: list[Tensor]) -> pipelines.Pipeline:
    """torchao observes activations behind float weights."""
    return pipeline.replace(
        "calibrate-activations", CalibrateActivations(data, rounded_weights=False)
    )


def _by_ranges_alone(config: QuantizerConfig) -> QuantizerConfig:
    """Without what needs the data before observers are in: moved scales, error feedback."""
    module = config.global_config
    assert module is not None
    specs = {
        name: spec and spec.model_copy(update={"algorithm": "nearest"})
        for name, spec in module.op_state_spec.items()
    }
    module.op_state_spec = specs
    config.migrate_scales = False
    return config


def test_our_quantization_through_prepare_pt2e_is_our_pipeline(
    net: nn.Module, data: list[Tensor]
) -> None:
    config = _by_ranges_alone(QuantizerConfig.presets.w8a8_affine())
    theirs = converted(net, GraphOptQuantizer(config), data, fold_quantize=False)
    ours = unrounded_calibration(pipelines.quantize(config, data), data).run(net, (X,))
    assert torch.allclose(
        theirs(X), ours.module()(X), atol=1e-5 * float(ours.module()(X).abs().max())
    )
    assert {kind.dtype for key, kind in theirs.state_dict().items() if "quantized" in key} == {
        torch.int8
    }


@pytest.mark.parametrize("algorithm", ["skm", "gptq"])
def test_palettes_that_need_data_are_refused_by_name(net: nn.Module, algorithm: str) -> None:
    config = KMeansPalettizerConfig.presets.w4()
    assert config.global_config is not None
    spec = config.global_config.op_state_spec["weight"].model_copy(  # type: ignore[index, union-attr]
        update={"algorithm": algorithm}
    )
    config.global_config.op_state_spec = {"weight": spec}
    with pytest.raises(CalibrationError, match=f"stem.weight: '{algorithm}' .global_config"):
        converted(net, GraphOptQuantizer(config), [X], fold_quantize=False)


def test_our_palettes_through_prepare_pt2e_are_our_pipeline(net: nn.Module) -> None:
    config = KMeansPalettizerConfig.presets.w4(group_size=8)
    theirs = converted(net, GraphOptQuantizer(config), [X], fold_quantize=False)
    ours = pipelines.palettize(config, fold_batch_norm=True).run(net, (X,))
    assert torch.allclose(theirs(X), ours.module()(X), atol=1e-6)
    # the dense weights are gone
    assert not any(key in ("conv.weight", "fc.weight") for key in theirs.state_dict())
    assert sum("lut_to_dense" in str(node.target) for node in theirs.graph.nodes) == 3


def test_tables_and_activations_of_one_config_go_together(
    net: nn.Module, data: list[Tensor]
) -> None:
    config = {"palettization": {}, "quantization": {}}
    gm = converted(net, GraphOptQuantizer(config), data, fold_quantize=False)
    targets = [str(node.target) for node in gm.graph.nodes]
    assert sum("lut_to_dense" in target for target in targets) == 3
    assert sum("quantize_per_tensor" in target for target in targets) > 6


@pytest.mark.slow
def test_our_weights_over_another_quantizers_activations(
    net: nn.Module, data: list[Tensor]
) -> None:
    base = converted(net, xnnpack(), data)
    both = converted(
        net, GraphOptQuantizer(KMeansPalettizerConfig(), base=xnnpack()), data, fold_quantize=False
    )
    assert rounding_ops(both) == rounding_ops(base)
    assert sum("lut_to_dense" in str(node.target) for node in both.graph.nodes) == 3


@pytest.mark.integration
def test_composable_quantizer_takes_ours_beside_another(net: nn.Module, data: list[Tensor]) -> None:
    linear = KMeansPalettizerConfig(global_config=None).set_module_name(
        "fc", KMeansPalettizerConfig().global_config
    )
    both = ComposableQuantizer([GraphOptQuantizer(linear), xnnpack()])
    gm = converted(net, both, data, fold_quantize=False)
    lookups = [node for node in gm.graph.nodes if "lut_to_dense" in str(node.target)]
    assert [next(iter(node.users)).target for node in lookups] == [aten.linear.default]
    convs = [node for node in gm.graph.nodes if node.target is aten.conv2d.default]
    assert all("dequantize_per_channel" in str(node.args[1].target) for node in convs)


@pytest.mark.integration
def test_what_our_quantizer_made_survives_export(
    net: nn.Module, data: list[Tensor], tmp_path: Path
) -> None:
    gm = converted(
        net, GraphOptQuantizer({"palettization": {}, "quantization": {}}), data, fold_quantize=False
    )
    program = torch.export.export(gm, (X,))
    torch.export.save(program, tmp_path / "net.pt2")
    again = graphopt.capture(tmp_path / "net.pt2")
    assert torch.equal(again.module()(X), gm(X))


# --- models that PT2E has converted -----------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("fold", some([True, False], lambda fold: fold))
def test_converted_model_is_palettized_further(
    net: nn.Module, data: list[Tensor], tmp_path: Path, fold: bool
) -> None:
    gm = converted(net, xnnpack(), data, fold_quantize=fold)
    before = rounding_ops(gm)
    config = KMeansPalettizerConfig.presets.w4(group_size=8)
    pipeline = pipelines.palettize(config).insert_after("raise-to-vocabulary", DequantizeWeights())
    program = pipeline.run(gm, (X,), verify=True)
    assert len(program.report().palettized) == 3
    values = {value for _, value in rounding_ops(program.graph_module)}
    assert values == {value for _, value in before}
    for name, suffix in (("coreai", "aimodel"), ("executorch", "pte")):
        artifact = graphopt.lower(program, name)
        artifact.save(tmp_path / f"net.{suffix}")
        assert artifact.verification.max_error < 0.02


@pytest.mark.integration
def test_converted_weights_are_left_alone_unless_asked(net: nn.Module, data: list[Tensor]) -> None:
    gm = converted(net, xnnpack(), data)
    report = pipelines.palettize().run(gm, (X,)).report()
    assert not report.palettized
    assert sum(row.detail == "already compressed" for row in report.skipped) == 3


def test_value_that_an_op_reads_twice_is_observed_once() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x * x)

    torch.manual_seed(0)
    model, x = Squared().eval(), torch.randn(4, 16)
    graph = torch.export.export(model, (x,)).run_decompositions({}).module()
    config = _by_ranges_alone(QuantizerConfig())
    prepared = prepare_pt2e(graph, GraphOptQuantizer(config))
    prepared(x)
    theirs = convert_pt2e(prepared)(x)
    ours = unrounded_calibration(pipelines.quantize(config, [x]), [x]).run(model, (x,)).module()(x)
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()
