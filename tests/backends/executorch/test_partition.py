"""What XNNPACK's partitioner must leave outside, on the ExecuTorch runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.quantization import QuantizerConfig

pytestmark = [pytest.mark.executorch, pytest.mark.integration]


class Scaled(nn.Module):
    """A rounded tensor without dimensions beside rounded ones with some."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 12)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.layer(x)
        return y * t.exp() + y.mean()


class Padded(nn.Module):
    """Padded integers that no convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(x, [0, 0, 0, 0, 0, 1])
        return y[:, 1:].softmax(1) + self.layer(x).mean(1, keepdim=True)


class Normalized(nn.Module):
    """A batch norm of a rounded sum, which no convolution takes in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)
        self.norm = nn.BatchNorm1d(4)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x) + x)) + self.norm(torch.relu(x))


CASES: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "scalar": (Scaled(), (torch.randn(4, 16), torch.tensor(0.3))),
    "batch norm": (Normalized(), (torch.randn(2, 4, 6),)),
    "padding": (Padded(), (torch.randn(1, 3, 6, 6),)),
    "padding of volumes": (nn.Conv3d(3, 4, 3, padding=1), (torch.randn(1, 3, 4, 6, 6),)),
    "padding of a convolution": (nn.Conv2d(3, 4, 3, padding=1), (torch.randn(1, 3, 6, 6),)),
}


@pytest.mark.parametrize("case", CASES)
def test_rounded_values_run_where_the_delegate_does_not_take_them(
    case: str, tmp_path: Path
) -> None:
    model, example = CASES[case]
    config = QuantizerConfig.presets.w8a8()
    program = graphopt.compress(model.eval(), example, config, calibration_data=[example])
    artifact = graphopt.lower(program, "executorch")
    artifact.save(tmp_path / "m.pte")
    assert artifact.verification.holds


class Rewritten(nn.Module):
    """Adds a copy, parts of which are written, to what was copied."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = y.clone()
        z[:, 1:4, ::2] = 0.5
        return self.second(y + z)


def test_copies_between_roundings_are_no_delegates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 12)
    program = graphopt.compress(
        Rewritten().eval(), (x,), {"quantization": {}}, calibration_data=[x], progress=False
    )
    artifact = graphopt.lower(program, "executorch")
    artifact.save(tmp_path / "m.pte")
    assert artifact.verification.holds
