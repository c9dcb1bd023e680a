"""Integers that no kernel computes with are packed codes where tables are compressed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.executorch.lower import legal_passes
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.passes.pass_manager import run_passes
from graphopt.quantization import ModuleQuantizerConfig, QuantizerConfig
from graphopt.specs import (
    PerBlockGranularity,
    PerChannelGranularity,
    QuantizationSpec,
)

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SPECS = {
    "int4 in blocks": QuantizationSpec(
        dtype=torch.int4, granularity=PerBlockGranularity(block_size=32)
    ),
    "int4 with zero points": QuantizationSpec(
        dtype=torch.int4, qscheme="asymmetric", granularity=PerBlockGranularity(block_size=32)
    ),
    "uint3": QuantizationSpec(
        dtype="uint3", qscheme="asymmetric", granularity=PerChannelGranularity()
    ),
    "int6": QuantizationSpec(dtype="int6", granularity=PerChannelGranularity()),
    "int2": QuantizationSpec(dtype=torch.int2),
    "int8": QuantizationSpec(granularity=PerChannelGranularity()),
}


def compressed(spec: QuantizationSpec) -> CompressedProgram:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(512, 64)
    ).eval()
    module = ModuleQuantizerConfig(
        op_state_spec={"weight": spec}, op_input_spec=None, op_output_spec=None
    )
    made: CompressedProgram = graphopt.compress(net, (X,), QuantizerConfig(global_config=module))
    return made


def stored(program: graphopt.Program) -> list[Tensor]:
    return [*program.graph_module.parameters(), *program.graph_module.buffers()]


@pytest.mark.parametrize("name", SPECS)
def test_graph_computes_the_same_from_packed_codes(name: str) -> None:
    program = compressed(SPECS[name])
    want = program.module()(X)
    legal = program.copy()
    run_passes(legal.graph_module, list(legal_passes("compressed")))
    torch.testing.assert_close(legal.module()(X), want, rtol=1e-5, atol=1e-5)
    large = [t for t in stored(legal) if t.numel() >= 512 and t.is_floating_point()]
    # no weight is dense: what floats there are list the values of bytes, or are scales
    assert all(t.numel() <= max(2048, 64 * 512 // 32) for t in large)


@pytest.mark.integration
@pytest.mark.executorch
@pytest.mark.parametrize(
    "name",
    ["int4 in blocks", *(pytest.param(name, marks=pytest.mark.slow) for name in [*SPECS][1:])],
)
def test_file_is_as_small_as_the_bits_say(name: str, tmp_path: Path) -> None:
    program = compressed(SPECS[name])
    artifact = graphopt.lower(program, "executorch", tables="compressed")
    artifact.save(tmp_path / "model.pte", max_error=1e-5)
    biases = 4 * (32 + 32 + 64)
    weights = sum(-(-row.stored_bits // 8) for row in program.report()) + biases
    assert artifact.size <= 1.1 * weights + 64_000
