"""Constants that are added behind convolutions: coremltools folds them into biases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt

pytestmark = [pytest.mark.integration, pytest.mark.coreml]


class _Behind(nn.Module):
    def __init__(self, conv: nn.Module, op: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.op = conv, op
        self.constant = nn.Parameter(torch.arange(1.0, 5.0).reshape(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.conv(x), self.constant)


CASES: dict[
    str, tuple[type[nn.Module], dict[str, int | bool], Callable[[Tensor, Tensor], Tensor]]
] = {
    "a number behind a grouped transposed convolution": (
        nn.ConvTranspose2d,
        {"groups": 2, "bias": False},
        lambda y, c: y + 1.5,
    ),
    "a constant that is subtracted and read again": (
        nn.Conv2d,
        {"bias": False},
        lambda y, c: (y - c).relu() * c,
    ),
    "a constant behind a transposition": (
        nn.Conv2d,
        {},
        lambda y, c: y.permute(0, 2, 3, 1) + c[:, 0, 0],
    ),
    "a constant behind a transposed convolution and a transposition": (
        nn.ConvTranspose2d,
        {"groups": 2},
        lambda y, c: c[:, 0, 0] - y.permute(0, 2, 3, 1),
    ),
}


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "tables"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_behind_a_convolution_is_kept(case: str, compressed: bool, tmp_path: Path) -> None:
    kind, options, op = CASES[case]
    torch.manual_seed(0)
    model = _Behind(kind(4, 4, 3, **options), op).eval()
    inputs = (torch.randn(1, 4, 6, 6),)
    program = graphopt.capture(model, inputs)
    if compressed:
        program = graphopt.compress(model, inputs, {"palettization": {}}, progress=False)
    artifact = graphopt.lower(program, "coreml", precision="float32")
    artifact.save(tmp_path / "m.mlpackage", verify=False)
    assert artifact.verify().max_error < 1e-5
