"""Float16 on Core AI: what overflows there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt

pytestmark = pytest.mark.coreai


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
