"""Stored weights in ops of the standard: every form in one model, beside what NumPy makes of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tables_on_targets import SPECS as TABLES
from torch import Tensor, nn

import graphopt
from graphopt.backends.base import Artifact
from graphopt.ir.program import Program
from graphopt.palettization import KMeansPalettizer, KMeansPalettizerConfig, PalettizationSpec
from graphopt.palettization.spec import PerGroupedChannelGranularity
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
        for scheme in (QuantizationScheme.SYMMETRIC, ASYMMETRIC)
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
SPECS = {"tables": TABLES, "integers": INTEGERS}


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


def check_forms(layer: str, specs: dict[str, Any], folder: Path, **options: Any) -> None:
    outcome = saved(of_each(layer, specs), folder, **options).verification
    assert outcome is not None
    assert outcome.complete
    assert outcome.weights == len(specs)
    errors = dict(zip(specs, outcome.outputs, strict=True))
    assert {name: error for name, error in errors.items() if error > 1e-6} == {}


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["folded", "dequantize"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", SPECS)
def test_every_form_of_weight_runs_as_in_pytorch(
    layer: str, kind: str, weights: str, tmp_path: Path
) -> None:
    check_forms(layer, SPECS[kind], tmp_path, weights=weights)


# of each way to take codes and scales apart one
FEW = {
    "tables": ("1 bits", "3 bits", "vectors in groups", "outliers, scales and int8 tables"),
    "integers": ("int8 affine", "int4 blocks symmetric", "uint6 asymmetric", "fp8 e4m3", "fp4"),
}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("layer", "kind", "weights"),
    [("conv", "tables", "folded"), ("linear", "integers", "dequantize")],
)
def test_forms_of_weights_run_as_in_pytorch(
    layer: str, kind: str, weights: str, tmp_path: Path
) -> None:
    specs = {name: SPECS[kind][name] for name in FEW[kind]}
    check_forms(layer, specs, tmp_path, weights=weights)


def stored_bytes(artifact: Artifact) -> dict[str, int]:
    """Name → bytes of what the saved file holds, read by `onnx`."""
    import onnx

    model = onnx.load(artifact.path)
    return {each.name: len(each.raw_data) for each in model.graph.initializer}


@pytest.mark.integration
def test_codes_take_their_bits_in_the_file(tmp_path: Path) -> None:
    widths = (1, 2, 3, 4, 6, 8)
    torch.manual_seed(0)
    model = Beside(lambda: nn.Linear(96, 64, bias=False), len(widths)).eval()
    given = {
        f"parts.{place}": {"op_state_spec": {"weight": PalettizationSpec(n_bits=bits)}}
        for place, bits in enumerate(widths)
    }
    config = KMeansPalettizerConfig(global_config=None, module_name_configs=given)
    palettizer = KMeansPalettizer(model, config)
    palettizer.prepare((torch.randn(2, 96),))
    sizes = stored_bytes(saved(palettizer.program(), tmp_path))
    for place, bits in enumerate(widths):
        mine = [size for name, size in sizes.items() if name.startswith(f"parts.{place}.")]
        assert max(mine) == 96 * 64 * bits // 8, bits


def decoded(path: Path) -> list[np.ndarray]:
    """Weights that the file's own integers and scales stand for, by the standard's formula."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    held = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        facts = {each.name: each.i for each in node.attribute}
        values, scale = held[node.input[0]].astype(np.float32), held[node.input[1]]
        zero = held[node.input[2]].astype(np.float32) if len(node.input) > 2 else scale * 0
        if facts.get("block_size"):
            scale, zero = (np.repeat(x, facts["block_size"], facts["axis"]) for x in (scale, zero))
        elif scale.ndim:
            along = [-1 if axis == facts["axis"] else 1 for axis in range(values.ndim)]
            scale, zero = scale.reshape(along), zero.reshape(along)
        found.append((values - zero) * scale)
    return found


@pytest.mark.integration
def test_integers_and_scales_in_the_file_are_the_weights(tmp_path: Path) -> None:
    names = ("int4 blocks symmetric", "uint4 asymmetric", "int8 affine", "int8 one scale")
    specs = {name: INTEGERS[name] for name in names}
    program = of_each("linear", specs)
    artifact = saved(program, tmp_path, weights="dequantize")
    assert artifact.path is not None
    eye = torch.eye(8).expand(1, 8, 8)
    with torch.no_grad():
        wanted = [
            out[0] - bias
            for out, bias in zip(program.graph_module(eye), biases(program), strict=True)
        ]
    found = [weight.reshape(8, 8) for weight in decoded(artifact.path)]
    assert len(found) == len(wanted) >= 3
    for weight, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(weight, want.numpy(), rtol=0, atol=1e-6)


def biases(program: Program) -> list[Tensor]:
    names = [name for name, _ in program.graph_module.named_parameters() if name.endswith("bias")]
    return [program.graph_module.get_parameter(name).detach() for name in names]


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["int4", "uint4", "int8"])
def test_products_in_the_runtimes_own_op_are_exact(kind: str, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 48), nn.Linear(48, 40, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.relu(self.first(x))
            return self.second(y), self.second(y.mean(1))

    spec = QuantizationSpec(
        dtype=kind,
        granularity=CHANNELS if kind == "int8" else PerBlockGranularity(axis=1, block_size=16),
        qscheme=ASYMMETRIC,
    )
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 5, 64)
    given = {"op_state_spec": {"weight": spec}, "op_input_spec": None, "op_output_spec": None}
    quantizer = Quantizer(model, QuantizerConfig(global_config=given))
    quantizer.prepare((x,))
    artifact: Any = saved(quantizer.program(), tmp_path, matmul="nbits")
    ops = [node.op_type for node in artifact.model.graph]
    assert ops.count("MatMulNBits") == 3
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(ops)
    assert artifact.verification.max_error < 1e-6


@pytest.mark.integration
def test_tables_of_integers_are_exact_in_the_runtimes_own_op(tmp_path: Path) -> None:
    """One table, tables of rows, with scales, along blocks that it has; others stay lookups."""
    entries = QuantizationSpec(dtype="int8")
    groups = PerGroupedChannelGranularity
    specs = {
        "one": PalettizationSpec(n_bits=4, lut_qspec=entries),
        "rows": PalettizationSpec(
            n_bits=2, lut_qspec=entries, granularity=groups(axis=0, group_size=8)
        ),
        "scales": PalettizationSpec(n_bits=3, lut_qspec=entries, enable_per_channel_scale=True),
        "blocks": PalettizationSpec(
            n_bits=4, lut_qspec=entries, granularity=groups(axis=1, group_size=16)
        ),
        "short blocks": PalettizationSpec(
            n_bits=4, lut_qspec=entries, granularity=groups(axis=1, group_size=8)
        ),
        "floats": PalettizationSpec(n_bits=4),
    }
    torch.manual_seed(0)
    model = Beside(lambda: nn.Linear(64, 32), len(specs)).eval()
    given = {
        f"parts.{place}": {"op_state_spec": {"weight": spec}}
        for place, spec in enumerate(specs.values())
    }
    config = KMeansPalettizerConfig(global_config=None, module_name_configs=given)
    palettizer = KMeansPalettizer(model, config)
    palettizer.prepare((torch.randn(5, 64),))
    artifact: Any = saved(palettizer.program(), tmp_path, matmul="nbits")
    ops = [node.op_type for node in artifact.model.graph]
    assert (ops.count("MatMulNBits"), ops.count("Gather")) == (4, 2)
    assert artifact.verify(torch.randn(3, 64)).max_error < 1e-6
