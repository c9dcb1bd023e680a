"""Quantization: from annotations over ranges to integers, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.linear_nets import X, captured, ops
from torch import nn

import graphopt
from graphopt.config.quantization import QuantizerConfig
from graphopt.errors import InputError
from graphopt.ir.annotations import record_of
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.graph_text import graph_text
from graphopt.passes import (
    AnnotateQuantization,
    CalibrateActivations,
    ConvertQuantization,
    DecodeWeights,
    DequantizeWeights,
    InsertFakeQuantize,
)
from graphopt.prepared import ActivationQuantizer, WeightQuantizer
from graphopt.prepared.findings import findings_of
from graphopt.prepared.state import parts_of
from graphopt.quantization import Quantizer

CHANNELS: dict[str, Any] = {"dtype": "int8", "granularity": {"type": "per_channel", "axis": 0}}


@pytest.fixture
def gm() -> CapturedModule:
    torch.manual_seed(0)
    return captured()


def annotate(*, activations: bool) -> AnnotateQuantization:
    slots = {"*": {"dtype": "int8"}} if activations else None
    return AnnotateQuantization(
        QuantizerConfig.from_dict(
            {
                "global_config": {
                    "op_state_spec": {"weight": CHANNELS},
                    "op_input_spec": slots,
                    "op_output_spec": slots,
                }
            }
        )
    )


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """int8 with a scale per row whose range clips neither end: −128 … 127 about −0.5."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = torch.maximum(-low.clamp(max=0) / 128, high.clamp(min=0) / 127)
    return scale * (weight / scale).round().clamp(-128, 127)


def by_hand(gm: CapturedModule) -> torch.Tensor:
    """The outputs with rounded weights."""
    copy = captured()
    copy.load_state_dict({name: value.clone() for name, value in gm.state_dict().items()})
    for value in copy.parameters():
        if value.ndim == 2:
            value.data = rounded(value.data)
    return copy(X)


def test_quantizers_stand_at_every_annotation_and_round_weights(gm: CapturedModule) -> None:
    annotate(activations=True)(gm)
    want = by_hand(gm)
    assert InsertFakeQuantize()(gm).modified
    weights = [name for name, value in gm.named_parameters() if value.ndim == 2]
    assert sorted(part.origin.name for part in parts_of(gm, WeightQuantizer)) == sorted(weights)
    observers = parts_of(gm, ActivationQuantizer)
    assert observers
    assert not any(bool(part.known) for part in observers)  # nothing was observed
    for part in observers:
        part.rounding = False
    torch.testing.assert_close(gm(X), want)


def test_quantizers_stand_nowhere_without_annotations(gm: CapturedModule) -> None:
    before = graph_text(gm)
    AnnotateQuantization(QuantizerConfig.from_dict({"global_config": None}))(gm)
    InsertFakeQuantize()(gm)
    assert not parts_of(gm, WeightQuantizer)
    assert graph_text(gm) == before


def test_annotated_weights_become_integers_with_their_scales(gm: CapturedModule) -> None:
    annotate(activations=False)(gm)
    want = by_hand(gm)
    assert ConvertQuantization()(gm).modified
    torch.testing.assert_close(gm(X), want)
    assert "quantized_decomposed.dequantize_per_channel.default" in ops(gm)
    assert {row.status for row in record_of(gm).rows} == {"quantized"}
    assert not ConvertQuantization()(gm).modified


def test_activations_without_a_scale_stay_in_float(gm: CapturedModule) -> None:
    annotate(activations=True)(gm)
    ConvertQuantization()(gm)
    assert not any("quantize_per_tensor" in op and "dequantize" not in op for op in ops(gm))


def test_integers_become_the_floats_that_they_stand_for(gm: CapturedModule) -> None:
    annotate(activations=False)(gm)
    ConvertQuantization()(gm)
    want = gm(X)
    assert DequantizeWeights()(gm).modified
    assert not any("dequantize" in op for op in ops(gm))
    assert torch.equal(gm(X), want)
    assert not DequantizeWeights()(gm).modified
    assert not DecodeWeights()(gm).modified


def test_floats_are_left_alone(gm: CapturedModule) -> None:
    before = graph_text(gm)
    assert not DequantizeWeights()(gm).modified
    AnnotateQuantization(QuantizerConfig.from_dict({"global_config": None}))(gm)
    assert not ConvertQuantization()(gm).modified
    assert graph_text(gm) == before


def test_scales_of_activations_span_what_was_seen_and_the_graph_stays(gm: CapturedModule) -> None:
    annotate(activations=True)(gm)
    before = graph_text(gm)
    CalibrateActivations([X])(gm)
    assert graph_text(gm) == before
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    (scale,) = (scale for name, (scale, _) in findings_of(gm).scales.items() if name in names)
    low, high = X.min().clamp(max=0), X.max().clamp(min=0)
    assert float(scale) == pytest.approx(float(torch.maximum(-low / 128, high / 127)))


def test_activations_without_data_are_refused(gm: CapturedModule) -> None:
    annotate(activations=True)(gm)
    with pytest.raises(InputError, match="there are no data"):
        CalibrateActivations([])(gm)


class Bounded(nn.Module):
    """Gives a value and what bounds it, which share a scale."""

    def __init__(self, high: float) -> None:
        super().__init__()
        self.first, self.second, self.high = nn.Linear(8, 8), nn.Linear(8, 8), high

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.first(x)
        return y, self.second(y.clamp(-0.3, self.high))


@pytest.mark.parametrize("high", [0.4, 0.7])
def test_bounds_between_two_steps_are_rounded_before_conversion_as_after_it(high: float) -> None:
    torch.manual_seed(0)
    model, x = Bounded(high).eval(), torch.randn(16, 8) * 3
    quantizer = Quantizer(model, QuantizerConfig())
    prepared = quantizer.prepare((x,))
    with quantizer.calibration_mode():
        prepared(x)
    before = prepared(x)
    after = quantizer.finalize()(x)
    assert all(
        torch.allclose(one, other, atol=1e-6) for one, other in zip(before, after, strict=True)
    )
    graphopt.pipelines.quantize(data=[x]).run(model, (x,), verify=True)
