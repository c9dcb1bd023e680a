"""Every form of quantized weight and activation on every target: executed or refused with a reason."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.quantized_targets import EXECUTED, digits, quantized_digits, saved
from helpers.tiers import cases
from torch import Tensor, nn

import graphopt
from graphopt.backends import lowering
from graphopt.errors import LoweringError
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.quantization import (
    ModuleQuantizerConfig,
    QuantizationFormulation,
    QuantizationScheme,
    QuantizationSpec,
    Quantizer,
    QuantizerConfig,
)
from graphopt.quantization.spec import PerBlockGranularity, PerChannelGranularity

ALL = [*EXECUTED, "torch"]


ASYMMETRIC = QuantizationScheme.ASYMMETRIC


class Weights(nn.Module):
    """One of every op that has a weight; "lut" is part of a name."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 8, 4)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.embed = nn.Embedding(32, 8)
        self.fc = nn.Linear(4, 8)
        self.right = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = self.up(torch.relu(self.convolution(x)))
        return self.fc(y.mean((2, 3))) @ self.right + self.embed(ids).mean(1), y


ARGS = (torch.randn(1, 4, 7, 7), torch.randint(0, 32, (1, 5)))


CHANNELS, BLOCKS = PerChannelGranularity(), PerBlockGranularity(block_size=2)


SPECS = {
    "int8": QuantizationSpec(granularity=CHANNELS),
    "int8 one scale": QuantizationSpec(),
    "int8 affine": QuantizationSpec(granularity=CHANNELS, qscheme=ASYMMETRIC),
    "uint8": QuantizationSpec(dtype="uint8", granularity=CHANNELS),
    "int4 blocks": QuantizationSpec(dtype="int4", granularity=BLOCKS),
    "int4 blocks affine": QuantizationSpec(dtype="int4", granularity=BLOCKS, qscheme=ASYMMETRIC),
    "uint4": QuantizationSpec(dtype="uint4", granularity=CHANNELS),
    "int6": QuantizationSpec(dtype="int6", granularity=CHANNELS),
    "int3": QuantizationSpec(dtype="int3", granularity=CHANNELS),
    "uint3 affine": QuantizationSpec(dtype="uint3", granularity=CHANNELS, qscheme=ASYMMETRIC),
    "uint6 affine": QuantizationSpec(dtype="uint6", granularity=CHANNELS, qscheme=ASYMMETRIC),
    "int2": QuantizationSpec(dtype="int2", granularity=BLOCKS),
    "uint2": QuantizationSpec(dtype="uint2", granularity=BLOCKS, qscheme=ASYMMETRIC),
    "int4 minimum": QuantizationSpec(
        dtype="int4",
        granularity=CHANNELS,
        qscheme=ASYMMETRIC,
        qformulation=QuantizationFormulation.MINVAL,
    ),
    "fp8 e4m3": QuantizationSpec(dtype="fp8_e4m3", granularity=CHANNELS),
    "fp8 e5m2 powers of two": QuantizationSpec(
        dtype="fp8_e5m2", granularity=CHANNELS, scale_dtype="e8m0"
    ),
    "fp4": QuantizationSpec(dtype="fp4_e2m1", granularity=BLOCKS),
}


REFUSED = {
    "coreml": {"int4 minimum", "fp8 e4m3", "fp8 e5m2 powers of two", "fp4"},
    "executorch": {"fp8 e4m3", "fp8 e5m2 powers of two", "fp4"},
}


@cache
def weight_only(name: str) -> Quantizer:
    torch.manual_seed(0)
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(
            op_input_spec=None, op_output_spec=None, op_state_spec={"weight": SPECS[name]}
        )
    )
    quantizer = Quantizer(Weights().eval(), config)
    quantizer.prepare(ARGS)
    return quantizer


# in torch every form; the targets take turns, and each refuses what it cannot hold
TARGETS = ("coreai", "coreml", "executorch", "torch")
TURNS = {name: TARGETS[place % 4] for place, name in enumerate(SPECS)}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "target"),
    cases(
        SPECS,
        TARGETS,
        default=lambda name, target: name in REFUSED.get(target, ()) or TURNS[name] == target,
    ),
)
def test_every_form_of_weight_is_executed_or_refused(
    name: str, target: str, tmp_path: Path
) -> None:
    program = weight_only(name).program()
    if name in REFUSED.get(target, ()):
        with pytest.raises(LoweringError, match=r"convolution\.weight: .*; use"):
            saved(program, target, tmp_path)
        return
    outcome = saved(program, target, tmp_path).verification
    assert outcome.complete
    assert outcome.max_error < 2e-6
    assert outcome.weights == 5


@pytest.mark.integration
@pytest.mark.coreai
@pytest.mark.parametrize("name", SPECS)
def test_weights_finalized_for_core_ai_are_raised_back(name: str) -> None:
    quantizer = weight_only(name)
    neutral, finalized = quantizer.program().graph_module, quantizer.finalize(backend="coreai")
    torch.testing.assert_close(finalized(*ARGS)[0], neutral(*ARGS)[0], rtol=1e-5, atol=1e-5)
    raised = lowering.as_program(finalized, ARGS).graph_module
    torch.testing.assert_close(raised(*ARGS)[0], neutral(*ARGS)[0], rtol=1e-5, atol=1e-5)
    assert not any("coreai" in str(node.target) for node in raised.graph.nodes)


ACTIVATIONS = {
    "int8": QuantizationSpec(),
    "int8 affine": QuantizationSpec(qscheme=ASYMMETRIC),
    "uint8": QuantizationSpec(dtype="uint8", qscheme=ASYMMETRIC),
    "int8 minimum": QuantizationSpec(
        qscheme=ASYMMETRIC, qformulation=QuantizationFormulation.MINVAL
    ),
    "fp8": QuantizationSpec(dtype="fp8_e4m3"),
    "int4": QuantizationSpec(dtype="int4", qscheme=ASYMMETRIC),
}


NOT_HELD = {"coreml": {"fp8", "int4"}, "executorch": {"fp8"}, "coreai": {"int4"}}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "target"),
    cases(
        ACTIVATIONS,
        TARGETS,
        default=lambda name, target: (
            name in NOT_HELD.get(target, ()) or TARGETS[list(ACTIVATIONS).index(name) % 4] == target
        ),
    ),
)
def test_every_form_of_activation_is_executed_or_refused(
    name: str, target: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    spec = ACTIVATIONS[name]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    names = "op_input_spec", "op_output_spec", "module_output_spec"
    slots = {name: {"*": spec} for name in names}
    config = QuantizerConfig(global_config=ModuleQuantizerConfig(**slots))
    x = torch.randn(2, 3, 10, 10)
    quantizer = Quantizer(model, config)
    quantizer.prepare((x,))
    quantizer.calibrate([x])
    program = quantizer.program()
    if name in NOT_HELD.get(target, ()):
        with pytest.raises(LoweringError, match="activations; use one of"):
            saved(program, target, tmp_path)
        return
    artifact = saved(program, target, tmp_path)
    with torch.no_grad():
        wanted = program.graph_module(x)
    step = max(r.scale for r in quantizer.summary().activations if r.name == "conv2d_1")
    assert artifact.verification.max_error * float(wanted.abs().max()) <= 1.01 * step


@pytest.mark.integration
@pytest.mark.executorch
@pytest.mark.parametrize(
    "spec",
    [
        PalettizationSpec(n_bits=4),
        PalettizationSpec(n_bits=2, lut_qspec=QuantizationSpec(dtype=torch.int8)),
        PalettizationSpec(n_bits=4, cluster_dim=2, enable_per_channel_scale=True),
    ],
    ids=["table", "int8 table", "vectors and scale"],
)
def test_tables_are_expanded_where_the_target_has_none(
    spec: PalettizationSpec, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    config = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    palettizer = KMeansPalettizer(model, KMeansPalettizerConfig(global_config=config))
    palettizer.prepare((torch.randn(1, 3, 8, 8),))
    artifact = saved(palettizer.program(), "executorch", tmp_path)
    assert artifact.verification.max_error < 1e-5
    assert any("stored as a dense weight" in note for note in artifact.delegation.notes)


@pytest.mark.integration
@pytest.mark.parametrize(
    "target", cases(("coreai", "coreml", "torch"), default=lambda target: target == "coreml")
)
def test_joint_form_keeps_tables_of_integers(target: str, tmp_path: Path) -> None:
    """4-bit tables of int8 entries with int8 activations, in two steps."""
    model, (images, _), calibration = digits()
    spec = PalettizationSpec(n_bits=4, lut_qspec=QuantizationSpec())
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )
    palettizer = KMeansPalettizer(model, config)
    palettizer.prepare((images[:2],))
    through = target if target == "coreai" else "torch"
    palettized = palettizer.finalize(backend=through)
    quantizer = Quantizer(
        palettized, QuantizerConfig(global_config=ModuleQuantizerConfig(op_state_spec=None))
    )
    quantizer.prepare((images[:2],))
    quantizer.calibrate(calibration.split(64))
    program = quantizer.program()
    artifact = saved(program, target, tmp_path)
    assert artifact.verification.max_error < 0.02
    with torch.no_grad():
        kept = (program.graph_module(images).argmax(1) == model(images).argmax(1)).float().mean()
    assert kept > 0.97
    if target == "coreai":
        targets = [str(n.target) for n in quantizer.finalize(backend="coreai").graph.nodes]
        assert targets.count("coreai.lut_to_dense.default") == spec_count(palettized)
        # LUT → int8 → scale: the dequantize follows the lookup of integers
        lookups = [
            n
            for n in quantizer.finalize(backend="coreai").graph.nodes
            if str(n.target) == "coreai.lut_to_dense.default"
        ]
        for lookup in lookups:
            assert lookup.meta["val"].dtype == torch.int8
            assert [str(user.target) for user in lookup.users] == [
                "coreai.constexpr_blockwise_shift_scale.default"
            ]
    if target == "coreml":
        text = str(artifact.model._mil_program)  # type: ignore[attr-defined]
        assert "constexpr_lut_to_dense" in text
        assert "constexpr_blockwise_shift_scale" in text
        assert "dequantize" in text


def spec_count(module: torch.fx.GraphModule) -> int:
    return sum("lut_to_dense" in str(node.target) for node in module.graph.nodes)


@pytest.mark.integration
@pytest.mark.coreml
def test_older_deployment_targets_take_what_they_can(tmp_path: Path) -> None:
    quantizer = quantized_digits()
    program = quantizer.program()
    artifact = graphopt.lower(program, "coreml", minimum_deployment_target="iOS17")
    artifact.save(tmp_path / "net.mlpackage")
    assert artifact.verification.max_error < 0.05
    with pytest.raises(LoweringError, match="raise minimum_deployment_target to iOS17"):
        graphopt.lower(program, "coreml", minimum_deployment_target="iOS16")
    weights = weight_only("int4 blocks").program()
    with pytest.raises(LoweringError, match="int4 weights; use one of"):
        graphopt.lower(weights, "coreml", minimum_deployment_target="iOS16")


@pytest.mark.slow
def test_sizes_follow_the_bits(tmp_path: Path) -> None:
    x = (torch.randn(1, 512),)
    sizes = {}
    for dtype in ("int2", "int3", "int4", "int6", "int8"):
        spec = QuantizationSpec(dtype=dtype, granularity=CHANNELS)
        config = QuantizerConfig(
            global_config=ModuleQuantizerConfig(
                op_input_spec=None, op_output_spec=None, op_state_spec={"weight": spec}
            )
        )
        for target in ("coreai", "coreml"):
            quantizer = Quantizer(nn.Linear(512, 512, bias=False), config)
            quantizer.prepare(x)
            folder = tmp_path / f"{dtype}-{target}"
            folder.mkdir()
            sizes[target, dtype] = saved(quantizer.program(), target, folder).size
    for (target, dtype), size in sizes.items():
        bits = int(dtype.removeprefix("int"))
        if (target, bits) == ("coreai", 3):
            bits = 4  # its tables have 2, 4, 16, … entries
        ideal = 512 * 512 * bits / 8
        assert ideal < size < ideal + 12_000, (target, dtype)
