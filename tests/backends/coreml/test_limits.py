"""What Core ML cannot hold is named: op, module, values, and what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import LoweringError

pytestmark = [pytest.mark.coreml, pytest.mark.integration]


class Part(nn.Module):
    """A function that is a part of a model, so that it has a name."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.part = nn.Module()
        self.part.forward = function

    def forward(self, *args: Tensor) -> Any:
        return self.part(*args)


def _convolution(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv3d(x, weight, dilation=2)


def _six_axes(x: Tensor) -> Tensor:
    return (x.reshape(1, 2, 1, 2, 2, 2) * 2).sum(0)


def _spectrum(x: Tensor) -> Tensor:
    return torch.fft.rfft(x)


REFUSED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], tuple[str, ...]]] = {
    "computed weights with gaps": (
        _convolution,
        (torch.rand(1, 2, 7, 7, 7), torch.rand(3, 2, 3, 3, 3)),
        ("aten.conv3d", "in part", "float32 (3, 2, 3, 3, 3)", "make it a parameter or buffer"),
    ),
    "six axes": (_six_axes, (torch.rand(2, 8),), ("aten.view", "in part", "5 axes", "merge axes")),
    "complex results": (
        _spectrum,
        (torch.rand(3, 4),),
        ("aten.fft_rfft", "complex64 (3, 3)", "real and imaginary parts"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_op_its_values_and_the_way_out(case: str) -> None:
    function, args, words = REFUSED[case]
    program = graphopt.capture(Part(function).eval(), args)
    with pytest.raises(LoweringError, match="Core ML cannot hold this program") as refused:
        graphopt.lower(program, "coreml")
    missing = [word for word in words if word not in str(refused.value)]
    assert not missing, str(refused.value)
