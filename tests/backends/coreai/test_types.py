"""Float types on Core AI: layers in 16 bits, and what overflows there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import LoweringError

pytestmark = pytest.mark.coreai
INT4 = {
    "op_state_spec": {"weight": {"dtype": "int4"}},
    "op_input_spec": None,
    "op_output_spec": None,
}
CONFIGS: dict[str, Any] = {
    "tables": {"palettization": {}},
    "W8A8": {"quantization": {}},
    "int4": {"quantization": {"global_config": INT4}},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.LayerNorm(36)
        self.fc = nn.Linear(36, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x)).flatten(2)
        return self.fc(self.norm(y))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 0.05), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_in_16_bits_are_right(
    name: str, dtype: torch.dtype, limit: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8).to(dtype)
    program = graphopt.compress(Net().to(dtype).eval(), (x,), CONFIGS[name], calibration_data=[x])
    if (name, dtype) == ("tables", torch.bfloat16):
        with pytest.raises(LoweringError, match="fc.weight: tables of bfloat16; use one of"):
            graphopt.lower(program, "coreai")
        return
    artifact = graphopt.lower(program, "coreai")
    artifact.save(tmp_path / "net.aimodel", verify=False)
    assert artifact.verify().max_error < limit


def test_values_that_overflow_stay_float32(tmp_path: Path) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.log(torch.exp(6 * self.fc(x)) + 1)

    torch.manual_seed(0)
    x = torch.randn(3, 16) * 4
    program = graphopt.capture(Chain().eval(), (x,))
    errors = []
    for options in ({}, {"calibration_data": [x]}):
        artifact = graphopt.lower(program, "coreai", precision="float16", **options)
        artifact.save(tmp_path / "net.aimodel", overwrite=True, verify=False)
        errors.append(artifact.verify().max_error)
    assert errors[0] == float("inf")
    assert errors[1] < 0.01
