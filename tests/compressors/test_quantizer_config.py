"""Quantizer: which spec holds where."""

from __future__ import annotations

import pytest
import torch
from helpers.quantized_net import ACT, Net, calibrated
from torch import Tensor, nn

import graphopt
from graphopt.errors import ConfigError
from graphopt.quantization import (
    ModuleQuantizerConfig,
    OpQuantizerConfig,
    QuantizationScheme,
    QuantizationSpec,
    Quantizer,
    QuantizerConfig,
)
from graphopt.quantization.spec import PerChannelGranularity

AFFINE = QuantizationSpec(qscheme=QuantizationScheme.ASYMMETRIC)


# --- configs ---------------------------------------------------------------------------------------
def test_none_switches_off_by_type_name_and_op() -> None:
    model = Net().eval()
    off = QuantizerConfig().without("fc")
    kept = {r.name for r in calibrated(model, off).summary().activations if r.status == "quantized"}
    assert "relu" in kept
    assert "linear" not in kept
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_type_config={"conv2d": None, "add": None})
    )
    assert [row.name for row in calibrated(model, config).summary().quantized] == ["fc.weight"]
    with pytest.raises(ConfigError, match="closest: conv, conv2"):
        calibrated(model, QuantizerConfig(module_name_configs={"conv3": None}))


def test_slots_by_position_and_by_name() -> None:
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.fc(a + b)

    inputs = (torch.randn(2, 3), torch.randn(2, 3))
    for slots, wanted in (({0: ACT}, {"a"}), ({"other": ACT}, {"b"}), ({"*": ACT, 1: None}, {"a"})):
        config = QuantizerConfig(
            global_config=ModuleQuantizerConfig(
                op_input_spec=slots, op_output_spec=None, op_type_config={"linear": None}
            )
        )
        records = calibrated(Add(), config, inputs).summary().activations
        assert {r.name for r in records if r.status == "quantized"} == wanted


def test_named_op_types_are_quantized_though_float_by_default() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    x = (torch.randn(4, 8),)
    plain = calibrated(model, None, x).summary().activations
    assert any("left in float unless a config names it" in r.detail for r in plain) or not any(
        r.name == "layer_norm" for r in plain
    )
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_type_config={"layer_norm": OpQuantizerConfig()})
    )
    named = calibrated(model, config, x).summary().activations
    assert any("layer_norm" in r.name and r.status == "quantized" for r in named)


def test_module_boundaries_have_specs_of_their_own() -> None:
    config = QuantizerConfig(
        global_config=None,
        module_name_configs={
            "conv2": ModuleQuantizerConfig(
                op_input_spec=None,
                op_output_spec=None,
                op_state_spec=None,
                module_input_spec={0: AFFINE},
                module_output_spec={"*": ACT},
            )
        },
    )
    records = calibrated(Net().eval(), config).summary().activations
    done = {r.name: r.detail for r in records if r.status == "quantized"}
    assert done == {"relu": "int8 asymmetric", "conv2d_1": "int8 symmetric"}


def test_the_more_specific_of_two_specs_holds_and_the_other_is_reported() -> None:
    uint8 = QuantizationSpec(dtype=torch.uint8, qscheme=QuantizationScheme.ASYMMETRIC)
    config = QuantizerConfig(
        module_name_configs={"1": ModuleQuantizerConfig(op_input_spec={"*": uint8})}
    )
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.warns(graphopt.errors.ConfigWarning, match="asks for int8 .* holds for all"):
        quantizer = calibrated(model, config, (torch.randn(2, 4),))
    table = quantizer.summary()
    (shared,) = [r for r in table.activations if r.name == "linear"]
    assert shared.detail == "uint8 asymmetric"
    assert any("asks for int8" in warning for warning in table.warnings)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (QuantizationSpec(granularity=PerChannelGranularity()), "one scale per tensor"),
        (
            QuantizationSpec(dtype="fp8_e4m3", granularity=PerChannelGranularity(axis=1)),
            "float activations",
        ),
    ],
)
def test_granularities_that_activations_cannot_have(spec: QuantizationSpec, text: str) -> None:
    config = QuantizerConfig(global_config=ModuleQuantizerConfig(op_input_spec={"*": spec}))
    with pytest.raises(ConfigError, match=text):
        Quantizer(nn.Linear(4, 4), config).prepare((torch.randn(2, 4),))
