"""Scales that are computed at run time, on targets that have no op for them: right as plain arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiers import cases
from torch import nn

import graphopt
from graphopt.errors import LoweringError
from graphopt.quantization import ModuleQuantizerConfig, QuantizerConfig
from graphopt.quantization.spec import PerBlockGranularity
from graphopt.specs import QuantizationSpec

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor(
    [[0.0], [0.01], [1.0], [100.0]]
)
SPECS = {
    "per tensor": {},
    "per token": {
        "qscheme": "asymmetric",
        "granularity": PerBlockGranularity(axis=-1, block_size=-1),
    },
    "blocks with a minimum": {
        "dtype": "uint4",
        "qscheme": "asymmetric",
        "qformulation": "minval",
        "granularity": PerBlockGranularity(axis=-1, block_size=8),
    },
}
SUFFIX = {"coreai": ".aimodel", "coreml": ".mlpackage", "executorch": ".pte", "onnx": ".onnx"}


def compressed(**fields: object) -> graphopt.Program:
    torch.manual_seed(0)
    spec = QuantizationSpec.model_validate({"qparam_calculator_cls": "dynamic", **fields})
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_input_spec={"*": spec}, op_output_spec=None)
    )
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)).eval()
    made: graphopt.Program = graphopt.compress(net, (X,), config)
    return made


@pytest.mark.integration
@pytest.mark.parametrize(
    ("target", "name"),
    cases(
        SUFFIX,
        SPECS,
        default=lambda target, name: (
            (target, name) in (("coreai", "per token"), ("coreml", "blocks with a minimum"))
        ),
    ),
)
def test_artifact_rounds_each_tensor_as_the_program_does(
    target: str, name: str, tmp_path: Path
) -> None:
    artifact = graphopt.lower(compressed(**SPECS[name]), target)
    artifact.save(tmp_path / f"model{SUFFIX[target]}")
    assert artifact.verification.max_error < 1e-2


def test_scales_of_narrow_floats_at_run_time_are_refused_by_name() -> None:
    program = compressed(dtype="fp8_e4m3")
    for target in ("coreai", "onnx"):
        with pytest.raises(LoweringError, match="fp8_e4m3 that are computed at run time"):
            graphopt.lower(program, target)
