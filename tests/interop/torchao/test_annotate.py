"""Annotations of torchao's quantizers, run by our engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.torchao_nets import Net, X, aten, converted, rounding_ops, xnnpack
from torch import Tensor, fx, nn
from torchao.quantization.pt2e import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

import graphopt
from graphopt.errors import ConfigError, InputError, PassError
from graphopt.torchao import AnnotateFromTorchao, quantize_with

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


# --- their annotations, our engine ----------------------------------------------------------------
@pytest.mark.slow
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


@pytest.mark.slow
def test_result_of_a_torchao_quantizer_runs_on_executorch(
    net: nn.Module, data: list[Tensor], tmp_path: Path
) -> None:
    program = quantize_with(xnnpack(), data).run(net, (X,))
    artifact = graphopt.lower(program, "executorch")
    artifact.save(tmp_path / "net.pte")
    # one step of the last scale, at most
    assert artifact.verification.max_error < 0.02
    assert artifact.delegation.delegates == 1  # type: ignore[attr-defined]
    assert not artifact.delegation.outside  # type: ignore[attr-defined]


def test_dynamic_scales_are_those_of_each_tensor(net: nn.Module, data: list[Tensor]) -> None:
    from dataclasses import replace

    dynamic = replace(ACTIVATION, is_dynamic=True)
    program = quantize_with(Custom(dynamic), data).run(net, (X,))
    rounded = [n for n in program.graph_module.graph.nodes if "round_by_range" in str(n.target)]
    assert rounded
    scale, zero = torch.ops.quantized_decomposed.choose_qparams.tensor(
        X, -128, 127, torch.finfo(torch.float32).eps, torch.int8
    )
    want = torch.fake_quantize_per_tensor_affine(X, float(scale), int(zero), -128, 127)
    got = rounded[0].target(X, *rounded[0].args[1:])
    assert (got - want).abs().max() <= 0.51 * float(scale)
    assert torch.isclose(got, want, atol=1e-5).float().mean() > 0.99


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
