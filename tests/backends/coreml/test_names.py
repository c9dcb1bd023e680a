"""Values keep theirs where coremltools would read a name as something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import LoweringError

pytestmark = [pytest.mark.coreml, pytest.mark.integration]


class _OpsCalledAsArguments(nn.Module):
    """Results called `floor`, `trunc` and `amax`, and arguments of the same text behind them."""

    def forward(self, x: Tensor) -> Tensor:
        whole, cut, most = x.floor(), x.trunc(), x.amax(1)
        there = torch.zeros(1, dtype=torch.int64).expand(5)
        below = torch.div(x, 0.75, rounding_mode="floor")
        toward_zero = torch.div(x, 0.75, rounding_mode="trunc")
        largest = most.scatter_reduce(0, there, x[0], reduce="amax")
        return whole + 2 * cut + 4 * below + 8 * toward_zero + largest[:, None]


def test_an_argument_is_not_the_result_of_an_op_of_its_name(tmp_path: Path) -> None:
    x = torch.linspace(-4, 4, 15).reshape(3, 5)
    program = graphopt.capture(_OpsCalledAsArguments().eval(), (x,))
    artifact = graphopt.lower(program, "coreml", precision="float32")
    artifact.save(tmp_path / "m.mlpackage")
    assert artifact.verification is not None
    assert artifact.verification.max_error < 1e-6


class _InputCalledAsArgument(nn.Module):
    def forward(self, floor: Tensor) -> Tensor:
        return torch.div(floor, 0.75, rounding_mode="floor")


def test_an_input_is_not_called_as_an_argument() -> None:
    program = graphopt.capture(_InputCalledAsArgument().eval(), (torch.rand(3),))
    with pytest.raises(LoweringError, match="'floor'.*give the input another name"):
        graphopt.lower(program, "coreml")
