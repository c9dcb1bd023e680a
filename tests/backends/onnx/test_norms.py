"""Norms that torch computes in float32 between values in 16 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt

pytestmark = [pytest.mark.onnx, pytest.mark.integration]


class Norm(nn.Module):
    """RMSNorm whose scale is applied in one type and given in another."""

    def __init__(self, applied: torch.dtype) -> None:
        super().__init__()
        self.linear, self.weight = nn.Linear(16, 16), nn.Parameter(torch.rand(16))
        self.applied = applied

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return (normed.to(self.applied) * self.weight.to(self.applied)).to(x.dtype)


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("applied", [torch.float16, torch.float32])
def test_a_scale_of_another_type_is_right(
    stored: torch.dtype, applied: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Norm(applied).to(stored).eval()
    artifact = graphopt.lower(model, "onnx", (torch.randn(2, 5, 16).to(stored),))
    artifact.save(tmp_path / "net.onnx")
    assert artifact.verification.max_error < 2e-3
    assert "RMSNormalization" in [node.op_type for node in artifact.model.graph]
