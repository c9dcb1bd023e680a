"""Stored weights in ops of the standard: every form in one model, beside what NumPy makes of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tables_on_targets import SPECS as TABLES
from helpers.tiers import some
from torch import Tensor, nn

import graphopt
from graphopt.backends.base import Artifact
from graphopt.ir.program import Program
from graphopt.palettization import KMeansPalettizer, KMeansPalettizerConfig, PalettizationSpec
from graphopt.quantization import (
    QuantizationFormulation,
    QuantizationScheme,
    QuantizationSpec,
    Quantizer,
    QuantizerConfig,
)
from graphopt.quantization.spec import PerBlockGranularity, PerChannelGranularity

pytestmark = pytest.mark.onnx

CHANNELS, BLOCKS = PerChannelGranularity(), PerBlockGranularity(block_size=2)
ASYMMETRIC = QuantizationScheme.ASYMMETRIC
MINIMUM = QuantizationFormulation.MINVAL
INTEGERS: dict[str, QuantizationSpec] = {
    "int8": QuantizationSpec(granularity=CHANNELS),
    "int8 one scale": QuantizationSpec(),
    "int8 affine": QuantizationSpec(granularity=CHANNELS, qscheme=ASYMMETRIC),
    "uint8": QuantizationSpec(dtype="uint8", granularity=CHANNELS),
    "int8 blocks": QuantizationSpec(granularity=BLOCKS),
    **{
        f"{kind} {'blocks ' * (grid is BLOCKS)}{scheme.value}": QuantizationSpec(
            dtype=kind, granularity=grid, qscheme=scheme
        )
        for kind in ("int2", "uint2", "int3", "uint3", "int4", "uint4", "int6", "uint6")
        for grid in (CHANNELS, BLOCKS)
        for scheme in QuantizationScheme
    },
    "int4 minimum": QuantizationSpec(
        dtype="int4", granularity=CHANNELS, qscheme=ASYMMETRIC, qformulation=MINIMUM
    ),
    "int8 minimum in blocks": QuantizationSpec(
        granularity=BLOCKS, qscheme=ASYMMETRIC, qformulation=MINIMUM
    ),
    "fp8 e4m3": QuantizationSpec(dtype="fp8_e4m3", granularity=CHANNELS),
    "fp8 e5m2, powers of two": QuantizationSpec(
        dtype="fp8_e5m2", granularity=BLOCKS, scale_dtype="e8m0"
    ),
    "fp4": QuantizationSpec(dtype="fp4_e2m1", granularity=BLOCKS),
    "fp4, powers of two": QuantizationSpec(
        dtype="fp4_e2m1", granularity=BLOCKS, scale_dtype="e8m0"
    ),
}


class Beside(nn.Module):
    """Layers beside each other, each with its own output."""

    def __init__(self, make: Any, count: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(make() for _ in range(count))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part(x) for part in self.parts]


# layer → what makes it, and its input
LAYERS: dict[str, tuple[Any, Tensor]] = {
    "linear": (lambda: nn.Linear(8, 8), torch.randn(2, 3, 8)),
    "gemm": (lambda: nn.Linear(8, 8), torch.randn(3, 8)),
    "conv": (lambda: nn.Conv2d(4, 8, 3), torch.randn(2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 4, 2, 2), torch.randn(1, 8, 3, 3)),
    "embedding": (lambda: nn.Embedding(16, 8), torch.randint(0, 16, (2, 5))),
}
FEW = {"linear", "conv"}


def of_each(layer: str, specs: dict[str, Any]) -> Program:
    """A layer for each spec, compressed by it."""
    make, x = LAYERS[layer]
    torch.manual_seed(0)
    model = Beside(make, len(specs)).eval()
    parts = {f"parts.{place}": spec for place, spec in enumerate(specs.values())}
    if isinstance(next(iter(specs.values())), PalettizationSpec):
        given = {name: {"op_state_spec": {"weight": spec}} for name, spec in parts.items()}
        palettizer = KMeansPalettizer(
            model, KMeansPalettizerConfig(global_config=None, module_name_configs=given)
        )
        palettizer.prepare((x,))
        return palettizer.program()
    given = {
        name: {"op_state_spec": {"weight": spec}, "op_input_spec": None, "op_output_spec": None}
        for name, spec in parts.items()
    }
    quantizer = Quantizer(model, QuantizerConfig(global_config=None, module_name_configs=given))
    quantizer.prepare((x,))
    return quantizer.program()


def saved(program: Program, folder: Path, **options: Any) -> Artifact:
    artifact = graphopt.lower(program, "onnx", **options)
    artifact.save(folder / "net.onnx")
    return artifact


@pytest.mark.integration
@pytest.mark.parametrize("layer", some(LAYERS, lambda layer: layer in FEW))
@pytest.mark.parametrize("specs", [TABLES, INTEGERS], ids=["tables", "integers"])
def test_every_form_of_weight_runs_as_in_pytorch(
    layer: str, specs: dict[str, Any], tmp_path: Path
) -> None:
    outcome = saved(of_each(layer, specs), tmp_path).verification
    assert outcome.complete
    assert outcome.weights == len(specs)
    errors = dict(zip(specs, outcome.outputs, strict=True))
    assert {name: error for name, error in errors.items() if error > 1e-6} == {}


def constants(artifact: Artifact) -> dict[str, np.ndarray]:
    """What the saved file holds, read by `onnx`."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(artifact.path)
    return {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}


def bytes_of(artifact: Artifact) -> dict[str, int]:
    import onnx

    model = onnx.load(artifact.path)
    return {each.name: len(each.raw_data) for each in model.graph.initializer}


@pytest.mark.parametrize(("bits", "stored"), [(1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 8)])
@pytest.mark.integration
def test_codes_take_their_bits_in_the_file(bits: int, stored: int, tmp_path: Path) -> None:
    model = nn.Linear(96, 64, bias=False).eval()
    config = {"global_config": {"op_state_spec": {"weight": PalettizationSpec(n_bits=bits)}}}
    palettizer = KMeansPalettizer(model, KMeansPalettizerConfig(**config))
    palettizer.prepare((torch.randn(2, 96),))
    artifact = saved(palettizer.program(), tmp_path)
    assert max(bytes_of(artifact).values()) == max(96 * 64 * stored // 8, 4 * 2**bits)


@pytest.mark.integration
def test_integers_and_scales_are_those_of_the_program(tmp_path: Path) -> None:
    """Decoded from the file by the standard's formula, and nothing else of ours."""
    specs = {name: INTEGERS[name] for name in ("int4 blocks symmetric", "int4 affine", "int8")}
    specs = {name: spec for name, spec in specs.items() if name in INTEGERS}
    program = of_each("linear", specs)
    artifact = saved(program, tmp_path)
    held = constants(artifact)
    import onnx

    found = []
    for node in onnx.load(artifact.path).graph.node:
        if node.op_type == "DequantizeLinear":
            axis = {each.name: each.i for each in node.attribute}
            values, scale = held[node.input[0]].astype(np.float32), held[node.input[1]]
            zero = held[node.input[2]].astype(np.float32) if len(node.input) > 2 else 0 * scale
            if axis.get("block_size"):
                scale, zero = (np.repeat(x, axis["block_size"], axis["axis"]) for x in (scale, zero))
            elif scale.ndim:
                along = [-1 if k == axis["axis"] else 1 for k in range(values.ndim)]
                scale, zero = scale.reshape(along), zero.reshape(along)
            found.append((values - zero) * scale)
    gm = program.graph_module
    dense = [
        torch.ops.graphopt.shift_scale.default(
            *(gm.get_buffer(str(a.target)) if isinstance(a, torch.fx.Node) else a for a in n.args)
        )
        for n in gm.graph.nodes
        if "shift_scale" in str(n.target)
    ]
    assert len(dense) == len(found) or len(found) == len(specs)
    for weight in dense:
        turned = weight.T.numpy()
        assert any(np.array_equal(turned, other) for other in found)
