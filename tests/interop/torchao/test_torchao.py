"""Both directions against torchao's own prepare_pt2e and convert_pt2e."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt import pipelines
from graphopt.errors import CalibrationError, ConfigError, InputError, PassError
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.passes import DequantizeWeights
from graphopt.quantization import CalibrateActivations, QuantizerConfig

pytest.importorskip("torchao", reason="needs the extra 'torchao'")

from torchao.quantization.pt2e import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    ComposableQuantizer,
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from graphopt.torchao import AnnotateFromTorchao, GraphOptQuantizer, quantize_with

aten = torch.ops.aten
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """A residual block, a concatenation, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        z = torch.relu(self.conv(y) + y)
        return self.fc(torch.cat([z, y], 1).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(8, 3, 8, 8))
    return model.eval()


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(4)]


def exported(net: nn.Module) -> Any:
    return torch.export.export(net, (X,)).run_decompositions({}).module()


def converted(net: nn.Module, quantizer: Quantizer, data: list[Tensor], **options: Any) -> Any:
    prepared = prepare_pt2e(exported(net), quantizer)
    with torch.no_grad():
        for batch in data:
            prepared(batch)
    return convert_pt2e(prepared, **options)


def xnnpack() -> Quantizer:
    pytest.importorskip("executorch", reason="needs the extra 'executorch'")
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


ACTIVATION = QuantizationSpec(
    torch.int8, MinMaxObserver, -128, 127, torch.per_tensor_affine, None, False
)
AVERAGED = QuantizationSpec(
    torch.uint8,
    MovingAverageMinMaxObserver.with_args(averaging_constant=0.3),
    0,
    255,
    torch.per_tensor_affine,
)
WEIGHT = QuantizationSpec(
    torch.int8, PerChannelMinMaxObserver, -127, 127, torch.per_channel_symmetric, 0
)


class Custom(Quantizer):  # type: ignore[misc]
    """Convolutions with int8 in and out, the sum sharing its output's scale, fixed linear inputs."""

    def __init__(self, activation: QuantizationSpec = ACTIVATION, bias: bool = False) -> None:
        super().__init__()
        self.activation, self.bias = activation, bias

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        fixed = FixedQParamsQuantizationSpec(
            torch.uint8, 1 / 64, 0, 0, 255, torch.per_tensor_affine
        )
        for node in model.graph.nodes:
            if node.target is aten.conv2d.default:
                x, weight = node.args[:2]
                inputs: dict[Any, Any] = {x: self.activation, weight: WEIGHT}
                if self.bias and len(node.args) > 2 and node.args[2] is not None:
                    inputs[node.args[2]] = DerivedQuantizationSpec(
                        [(x, node), (weight, node)],
                        lambda both: (torch.ones(1), torch.zeros(1, dtype=torch.int32)),
                        torch.int32,
                    )
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    inputs, self.activation, _annotated=True
                )
            elif node.target is aten.add.Tensor:
                first, second = node.args[:2]
                shared = SharedQuantizationSpec((first, node))
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    {first: self.activation, second: shared}, shared, _annotated=True
                )
            elif node.target is aten.linear.default:
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    {node.args[0]: fixed, node.args[1]: WEIGHT}, None, _annotated=True
                )
        return model

    def validate(self, model: fx.GraphModule) -> None:
        pass


def rounding_ops(gm: fx.GraphModule) -> set[tuple[str, tuple[Any, ...]]]:
    """(value that is rounded, scale, zero point and limits)."""
    return {
        (node.args[0].name, (round(float(node.args[1]), 6), *node.args[2:5]))
        for node in gm.graph.nodes
        if "quantize_per_tensor" in str(node.target) and "dequantize" not in str(node.target)
    }


# --- their annotations, our engine ----------------------------------------------------------------
@pytest.mark.parametrize(
    "make", [xnnpack, Custom, lambda: Custom(AVERAGED)], ids=["xnnpack", "custom", "averaged"]
)
def test_torchao_quantizer_gives_what_convert_pt2e_gives(
    net: nn.Module, data: list[Tensor], make: Any
) -> None:
    theirs = converted(net, make(), data)
    ours = quantize_with(make(), data).run(net, (X,), verify=True)
    assert rounding_ops(ours.graph_module) == rounding_ops(theirs)
    with torch.no_grad():
        found, want, exact = ours.module()(X), theirs(X), net(X)
    assert (found - want).abs().max() < 1e-5 * want.abs().max()
    # the rounding is there
    assert (want - exact).abs().max() > 1e-3 * want.abs().max()
    assert {row.name for row in ours.report().quantized} == {
        "stem.weight",
        "conv.weight",
        "fc.weight",
    }


def test_annotations_do_not_stay_in_the_graph(net: nn.Module, data: list[Tensor]) -> None:
    program = quantize_with(Custom(), data).run(net, (X,))
    assert not any("quantization_annotation" in n.meta for n in program.graph_module.graph.nodes)


def test_derived_biases_stay_in_float(net: nn.Module, data: list[Tensor]) -> None:
    program = quantize_with(Custom(bias=True), data).run(net, (X,))
    assert program.graph_module.conv.bias.dtype == torch.float32


def test_result_of_a_torchao_quantizer_runs_on_executorch(
    net: nn.Module, data: list[Tensor], tmp_path: Path
) -> None:
    program = quantize_with(xnnpack(), data).run(net, (X,))
    artifact = graphopt.lower(program, "executorch")
    artifact.save(tmp_path / "net.pte")
    # one step of the last scale, at most
    assert artifact.verify().max_error < 0.02
    assert artifact.delegation.delegates == 1  # type: ignore[attr-defined]
    assert not artifact.delegation.outside  # type: ignore[attr-defined]


def test_dynamic_scales_are_refused_with_the_place(net: nn.Module, data: list[Tensor]) -> None:
    from dataclasses import replace

    dynamic = replace(ACTIVATION, is_dynamic=True)
    with pytest.raises(ConfigError, match="conv2d.*run time"):
        quantize_with(Custom(dynamic), data).run(net, (X,))


def test_odd_range_is_refused_with_the_place(net: nn.Module, data: list[Tensor]) -> None:
    from dataclasses import replace

    odd = replace(ACTIVATION, quant_min=-100, quant_max=100)
    with pytest.raises(ConfigError, match="quant_min=-100, quant_max=100"):
        quantize_with(Custom(odd), data).run(net, (X,))


def test_only_quantizers_annotate() -> None:
    with pytest.raises(InputError, match="torchao Quantizer, got str"):
        quantize_with("xnnpack").run(Net().eval(), (X,))  # type: ignore[arg-type]


def test_their_annotation_stands_in_for_ours(net: nn.Module) -> None:
    with pytest.raises(PassError, match="annotate-quantization"):
        quantize_with(Custom(), []).without("annotate-from-torchao")
    assert AnnotateFromTorchao(Custom()).provides


@pytest.mark.slow
def test_coreml_quantizer_of_executorch_annotates_our_graph(
    net: nn.Module, data: list[Tensor]
) -> None:
    """Minutes: it exports its patterns anew for every graph.

    Its fake quantizers round while they observe, which our calibration does not, so that scales
    differ a little.
    """
    pytest.importorskip("executorch", reason="needs the extra 'executorch'")
    from coremltools.optimize.torch.quantization.quantization_config import (
        LinearQuantizerConfig,
        QuantizationScheme,
    )
    from executorch.backends.apple.coreml.quantizer import CoreMLQuantizer

    def make() -> Quantizer:
        return CoreMLQuantizer(
            LinearQuantizerConfig.from_dict(
                {
                    "global_config": {
                        "quantization_scheme": QuantizationScheme.affine,
                        "activation_dtype": torch.quint8,
                        "weight_dtype": torch.qint8,
                        "weight_per_channel": True,
                    }
                }
            )
        )

    theirs = converted(net, make(), data)
    ours = quantize_with(make(), data).run(net, (X,))
    with torch.no_grad():
        found, want, exact = ours.module()(X), theirs(X), net(X)
    rounded = [dict(rounding_ops(gm)) for gm in (ours.graph_module, theirs)]
    assert rounded[0].keys() == rounded[1].keys()
    for name, (scale, *limits) in rounded[1].items():
        assert rounded[0][name][0] == pytest.approx(scale, rel=0.05)
        assert rounded[0][name][2:] == tuple(limits)[1:]
    assert (found - exact).abs().max() < 2 * (want - exact).abs().max()


# --- our annotations, their engine ----------------------------------------------------------------
def unrounded_calibration(pipeline: pipelines.Pipeline, data: list[Tensor]) -> pipelines.Pipeline:
    """torchao observes activations behind float weights."""
    return pipeline.replace(
        "calibrate-activations", CalibrateActivations(data, rounded_weights=False)
    )


def test_our_quantization_through_prepare_pt2e_is_our_pipeline(
    net: nn.Module, data: list[Tensor]
) -> None:
    config = QuantizerConfig.presets.w8a8_affine()
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


def test_our_weights_over_another_quantizers_activations(
    net: nn.Module, data: list[Tensor]
) -> None:
    base = converted(net, xnnpack(), data)
    both = converted(
        net, GraphOptQuantizer(KMeansPalettizerConfig(), base=xnnpack()), data, fold_quantize=False
    )
    assert rounding_ops(both) == rounding_ops(base)
    assert sum("lut_to_dense" in str(node.target) for node in both.graph.nodes) == 3


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
@pytest.mark.parametrize("fold", [True, False])
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
        assert artifact.verify().max_error < 0.02


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
    config = QuantizerConfig()
    prepared = prepare_pt2e(graph, GraphOptQuantizer(config))
    prepared(x)
    theirs = convert_pt2e(prepared)(x)
    ours = unrounded_calibration(pipelines.quantize(config, [x]), [x]).run(model, (x,)).module()(x)
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()
