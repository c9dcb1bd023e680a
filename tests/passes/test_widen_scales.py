"""Powers of two as scales of integers are floats where a target wants floats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.passes import WidenScales
from graphopt.quantization.config import ModuleQuantizerConfig, QuantizerConfig
from graphopt.specs import PerBlockGranularity, QuantizationSpec


def _program() -> graphopt.Program:
    torch.manual_seed(0)
    spec = QuantizationSpec(
        scale_dtype=torch.float8_e8m0fnu, granularity=PerBlockGranularity(block_size=8, axis=1)
    )
    module = ModuleQuantizerConfig(
        op_state_spec={"weight": spec}, op_input_spec=None, op_output_spec=None
    )
    config = {"quantization": QuantizerConfig(global_config=module)}
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    return graphopt.compress(model, (torch.randn(2, 16),), config, progress=False)


def test_values_stay() -> None:
    program = _program()
    x = torch.randn(2, 16)
    want = program.module()(x)
    types = [value.dtype for value in program.graph_module.state_dict().values()]
    assert torch.float8_e8m0fnu in types
    WidenScales()(program.graph_module)
    types = [value.dtype for value in program.graph_module.state_dict().values()]
    assert torch.float8_e8m0fnu not in types
    assert torch.equal(program.module()(x), want)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("target", "suffix"),
    [
        pytest.param("coreai", ".aimodel", marks=pytest.mark.coreai),
        pytest.param("coreml", ".mlpackage", marks=pytest.mark.coreml),
    ],
)
def test_targets_take_them(target: str, suffix: str, tmp_path: Path) -> None:
    artifact = graphopt.lower(_program(), target)
    artifact.save(tmp_path / f"m{suffix}")
    assert artifact.verification is not None
    assert artifact.verification.complete
