"""Outputs that hold the same value stay outputs of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt


class SameThrice(nn.Module):
    """Three outputs of one value, and one that is turned."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.layer(x).relu()
        return y, y.view(3, 4), y * 1.0, y.transpose(0, 1)


@pytest.mark.integration
@pytest.mark.coreml
def test_equal_outputs_in_float16_have_names_of_their_own(tmp_path: Path) -> None:
    program = graphopt.capture(SameThrice().eval(), (torch.randn(3, 4),), dynamic_shapes=None)
    artifact = graphopt.lower(program, "coreml", precision="float16")
    artifact.save(tmp_path / "net.mlpackage")
    names = [output.name for output in artifact.model.get_spec().description.output]
    assert len(set(names)) == 4
    assert len(artifact.verification.outputs) == 4
