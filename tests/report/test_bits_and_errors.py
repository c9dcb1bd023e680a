"""Bits and errors of compressed weights and outputs."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from helpers.reported_nets import Net, X
from torch import Tensor, nn

import graphopt
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.errors import InputError
from graphopt.inspection import (
    bits_per_weight,
    diff,
)
from graphopt.numerics.packing import unpack
from graphopt.palettization import KMeansPalettizer
from graphopt.pruning import MagnitudePruner
from graphopt.quantization import Quantizer, QuantizerConfig


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


# --- bits -------------------------------------------------------------------------------------------------
def test_bits_are_those_of_the_tensors(net: nn.Module) -> None:
    plain = bits_per_weight(net, (X,))
    elements = sum(p.numel() for p in net.parameters())
    assert (plain.bpw, plain.total_bits, plain.total_weights) == (32, 32 * elements, elements)


def test_bits_of_tables_are_indices_tables_and_biases(net: nn.Module) -> None:
    palettizer = KMeansPalettizer(net)
    prepared = palettizer.prepare((X,))
    weights, biases = 2 * 256 + 64, 32
    expected = 4 * weights + 3 * 16 * 32 + 32 * biases
    for program in (palettizer.program(), prepared):
        found = bits_per_weight(program)
        assert found.total_bits == expected
        assert found.total_weights == weights + biases
        assert found.per_module_map["head"] == pytest.approx((4 * 64 + 16 * 32) / 64)


def test_bits_of_int8_weights_are_integers_and_scales(net: nn.Module) -> None:
    quantizer = Quantizer(net, QuantizerConfig.presets.w8())
    prepared = quantizer.prepare((X,))
    found = bits_per_weight(quantizer.program())
    # a scale of 32 bits per channel; zero points are 0
    assert found.total_bits == 8 * (2 * 256 + 64) + 36 * 32 + 32 * 32
    assert found.total_weights == 2 * 256 + 64 + 32
    with pytest.raises(InputError, match="still observes"):
        bits_per_weight(prepared)


def test_bits_of_pruned_weights_are_values_and_masks(net: nn.Module) -> None:
    pruner = MagnitudePruner(net)
    pruner.prepare((X,))
    found = bits_per_weight(pruner.program())
    assert found.total_bits == (2 * 256 + 64) * (16 + 1) + 32 * 32
    assert found.total_weights == 2 * 256 + 64 + 32


# --- diff -------------------------------------------------------------------------------------------------
def sqnr(want: Tensor, got: Tensor) -> float:
    exact = want.double()
    return 10 * math.log10(float(exact.square().sum() / (exact - got.double()).square().sum()))


def test_errors_are_those_of_weights_and_outputs(net: nn.Module) -> None:
    program = graphopt.compress(net, (X,), {"palettization": {}}, correct_statistics=False)
    found = diff(net, program, [X[:3], X[3:]])
    module = program.module()
    dense = {}
    for name in ("first.linear", "second.linear", "head"):
        lookup = torch.ops.graphopt.lut_to_dense
        parts = [module.state_dict()[f"{name}.weight_{part}"] for part in ("indices", "lut")]
        dense[name] = lookup(*parts, 4, list(net.get_submodule(name).weight.shape))
    layers = {layer.name.removesuffix(".weight"): layer for layer in found}
    assert set(layers) == set(dense)
    with torch.no_grad():
        seen: Any = {}
        hooks = [
            net.get_submodule(name).register_forward_hook(
                lambda m, args, out, name=name: seen.__setitem__(name, (args[0], out))
            )
            for name in dense
        ]
        exact = net(X)
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            linear = net.get_submodule(name)
            assert layer.weight_sqnr == pytest.approx(sqnr(linear.weight, dense[name]), abs=1e-3)
            alone = nn.functional.linear(seen[name][0], dense[name], linear.bias)
            assert layer.own_sqnr == pytest.approx(sqnr(seen[name][1], alone), abs=1e-3)
        assert layers["head"].output_sqnr == pytest.approx(sqnr(exact, module(X)), abs=1e-3)
        assert found.output_sqnr == pytest.approx((sqnr(exact, module(X)),), abs=1e-3)
        # nothing before the first layer adds to its error
        assert layers["first.linear"].own_sqnr == layers["first.linear"].output_sqnr
    assert layers["head"].bytes_before == 256
    assert layers["head"].bytes_after == 32 + 64
    assert layers["head"].tables == 1
    assert layers["head"].dtype == "float32 → 4-bit table"
    assert found.worst(1)[0].own_sqnr == min(layer.own_sqnr for layer in found)


def test_folded_norms_are_compared_as_folded() -> None:
    torch.manual_seed(0)
    model = Convolutions().train()
    x = torch.randn(8, 3, 8, 8)
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8) * 2 + 1)
    # moved ranges are other weights, though the graph computes the same
    config = {"quantization": {"migrate_scales": False}}
    program = graphopt.compress(model.eval(), (x,), config, calibration_data=[x])
    found = diff(model, program, [x])
    assert len(found) == 2
    assert all(30 < layer.weight_sqnr < 60 for layer in found)
    assert all(25 < layer.own_sqnr < 80 for layer in found)


def test_unchanged_layers_are_exact_and_json_has_no_infinity(net: nn.Module) -> None:
    found = diff(net, graphopt.capture(net, (X,)), [X])
    assert all(layer.weight_sqnr == layer.output_sqnr == math.inf for layer in found)
    assert "exact" in str(found)
    plain = json.loads(found.to_json())
    assert plain["layers"][0]["weight_sqnr"] is None


def test_finalized_modules_can_be_compared(net: nn.Module) -> None:
    pytest.importorskip("coreai_torch", reason="needs the extra 'coreai'")
    palettizer = KMeansPalettizer(net)
    palettizer.prepare((X,))
    finalized = palettizer.finalize(backend=graphopt.ExportBackend.CoreAI)
    assert [layer.bits for layer in diff(net, finalized, [X])] == [
        layer.bits for layer in diff(net, palettizer.program(), [X])
    ]


def test_other_models_are_refused(net: nn.Module) -> None:
    other = graphopt.capture(nn.Sequential(nn.Conv1d(4, 4, 1)).eval(), (torch.randn(1, 4, 4),))
    with pytest.raises(InputError, match="no op with a weight in common"):
        diff(graphopt.capture(net, (X,)), other)


# --- what else diff and bits meet -----------------------------------------------------------------------
class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


@pytest.mark.integration
def test_recurrent_weights_are_compared_gate_by_gate() -> None:
    model, x = Recurrent().eval(), torch.randn(2, 5, 16)
    palettizer = KMeansPalettizer(model)
    palettizer.prepare((x,))
    program = palettizer.program()
    found = diff(model, program, [x])
    names = ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"]
    assert [row.name for row in found] == [*(f"lstm.{name}" for name in names), "head.weight"]
    exact, rounded = model.lstm.double(), copy.deepcopy(model.lstm).double()
    for row in list(found)[:4]:
        weight = getattr(exact, row.name.removeprefix("lstm."))
        dense = _dense(program, row.name).double()
        energy, noise = weight.square().sum(), (weight - dense).square().sum()
        assert row.weight_sqnr == pytest.approx(10 * math.log10(float(energy / noise)), abs=1e-4)
        setattr(rounded, row.name.removeprefix("lstm."), nn.Parameter(dense))
    want, got = ((y, *states) for y, states in (exact(x.double()), rounded(x.double())))
    energy = sum(float(each.square().sum()) for each in want)
    noise = sum(float((a - b).square().sum()) for a, b in zip(want, got, strict=True))
    assert found.layers[0].own_sqnr == pytest.approx(10 * math.log10(energy / noise), abs=1e-3)


def _dense(program: CompressedProgram, name: str) -> Tensor:
    state = program.module().state_dict()
    codes = unpack(state[f"{name}_indices"], 4, program.table[name].numel)
    return state[f"{name}_lut"].flatten()[codes.long()].reshape(program.table[name].shape)


def test_keyword_inputs_are_compared() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(16, 8)

        def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
            return self.f(x) + y

    model, call = Keyword().eval(), {"x": torch.randn(2, 16), "y": torch.randn(2, 8)}
    palettizer = KMeansPalettizer(model)
    palettizer.prepare((call["x"],), {"y": call["y"]})
    assert diff(model, palettizer.program(), [call]).output_sqnr[0] > 15
    assert diff(model, model, [call]).output_sqnr == (math.inf,)


def test_programs_of_two_models_are_not_compared() -> None:
    x = torch.randn(2, 16)
    with pytest.raises(InputError, match="not made from the first"):
        diff(nn.Sequential(nn.Linear(16, 8)), nn.Sequential(nn.Linear(16, 4)), [x])
    with pytest.raises(InputError, match="do not fit the captured graph"):
        diff(graphopt.capture(Net().eval(), (x,)), Net().eval(), [torch.randn(2, 17)])


@pytest.mark.coreai
def test_bits_of_a_module_finalized_for_a_target_are_those_of_the_program() -> None:
    palettizer = KMeansPalettizer(nn.Sequential(nn.Linear(64, 128)).eval())
    palettizer.prepare((torch.randn(2, 64),))
    by_hand = (64 * 128 * 4 + 16 * 32 + 128 * 32) / (64 * 128 + 128)
    for made in (palettizer.program(), *(palettizer.finalize(backend=t) for t in TARGETS)):
        assert bits_per_weight(made).bpw == pytest.approx(by_hand)


TARGETS = ("coreai", "coreml", "torch")


def test_zero_points_that_are_zero_are_not_counted() -> None:
    x = torch.randn(2, 64)
    model = nn.Sequential(nn.Linear(64, 128, bias=False)).eval()
    quantizer = Quantizer(model)
    quantizer.prepare((x,))
    quantizer.calibrate([x])
    program = quantizer.program()
    by_hand = 8 + 32 * 128 / (64 * 128)
    assert bits_per_weight(program).bpw == pytest.approx(by_hand)
    assert diff(model, program, example_inputs=(x,)).layers[0].bits == pytest.approx(by_hand)
