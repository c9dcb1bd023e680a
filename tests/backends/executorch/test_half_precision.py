"""Models in 16 bits: sums that kernels would round after every term are computed in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import LoweringError

pytestmark = [pytest.mark.executorch, pytest.mark.integration]


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(512)

    def forward(self, x: Tensor, near_one: Tensor) -> tuple[Tensor, ...]:
        images = x.reshape(-1, 2, 16, 16).abs()
        return (
            self.norm(x + 3),
            x.abs().cumsum(-1),
            x.abs().sum(-1),
            near_one.prod(-1),
            F.avg_pool2d(images, 16),
        )


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_sums_are_as_exact_as_pytorchs(kind: torch.dtype, tmp_path: Path) -> None:
    x = torch.randn(2, 512)
    example = (x.to(kind), (1 + x / 64).to(kind))
    artifact = graphopt.lower(graphopt.capture(Sums().eval().to(kind), example), "executorch")
    artifact.save(tmp_path / "m.pte", verify=False)
    unit = torch.finfo(kind).eps
    assert max(artifact.verify().outputs) < 2 * unit


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_layers_that_add_up_in_sixteen_bits_are_taken_for_right(
    kind: torch.dtype, tmp_path: Path
) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.filter = nn.Linear(1024, 64), nn.Conv2d(16, 32, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.layer(x), self.filter(x.reshape(-1, 16, 8, 8))

    x = torch.randn(4, 1024).to(kind)
    artifact = graphopt.lower(graphopt.capture(Layers().eval().to(kind), (x,)), "executorch")
    artifact.save(tmp_path / "m.pte")
    assert artifact.verification.holds


def test_complex_results_made_of_real_ones_are_refused_by_name() -> None:
    class Rotation(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            turn = torch.polar(torch.ones(4), torch.arange(4.0))
            return torch.view_as_complex(x.reshape(-1, 4, 2)) * turn

    program = graphopt.capture(Rotation().eval(), (torch.randn(3, 8),))
    with pytest.raises(LoweringError, match=r"aten.view_as_complex.*real and imaginary"):
        graphopt.lower(program, "executorch")
