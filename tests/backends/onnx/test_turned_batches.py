"""Products in float16 whose operand has its batch turned inwards: they end no process, and are right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt

pytestmark = [pytest.mark.onnx, pytest.mark.integration]

ORDERS = [(1, 0, 2), (1, 2, 0), (1, 2, 0, 3), (1, 2, 3, 0)]


class Turned(nn.Module):
    """A product with a matrix, and with another behind it, on either side."""

    def __init__(self, order: tuple[int, ...], side: str) -> None:
        super().__init__()
        self.order, self.side = order, side
        sizes = [(5, 6, 7, 8)[axis] for axis in order]
        summed = sizes[-1] if side == "left" else sizes[-2]
        self.first = nn.Parameter(torch.randn(summed, summed))
        self.second = nn.Parameter(torch.randn(summed, summed))

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(self.order)
        if self.side == "left":
            return y @ self.first @ self.second.T
        return self.second @ (self.first @ y)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_turned_inwards_is_right(order: tuple[int, ...], side: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Turned(order, side).half().eval()
    x = torch.randn((5, 6, 7, 8)[: len(order)]).half()
    artifact = graphopt.lower(model, "onnx", (x,))
    artifact.save(tmp_path / "net.onnx")
    assert artifact.verify(x.flip(0)).max_error < 4e-3


class Mixer(nn.Module):
    """Two products, turned in front of each: the second turn follows what is turned behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(7, 4, bias=False), nn.Linear(5, 3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.transpose(0, 1)).transpose(1, 2))


def test_turns_of_turned_results_are_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    artifact = graphopt.lower(Mixer().half().eval(), "onnx", (torch.randn(5, 6, 7).half(),))
    artifact.save(tmp_path / "net.onnx")
    assert artifact.verification.max_error < 4e-3


@pytest.mark.parametrize("tables", [False, True])
def test_attention_that_counts_time_first_takes_float16(tables: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 2).half().eval()
    x = torch.randn(5, 2, 16).half()
    program = graphopt.capture(model, (x, x, x))
    if tables:
        program = graphopt.compress(program, None, {"palettization": {}})
    artifact = graphopt.lower(program, "onnx")
    artifact.save(tmp_path / "net.onnx")
    assert artifact.verification.max_error < 4e-3
