"""Padding in front of convolutions of integers: inside of the delegate, and as in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.backends.executorch.legalize import LegalizeForXNNPACK
from graphopt.backends.executorch.padding import PadIntegers
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.graph_text import graph_text
from graphopt.passes import DequantizeToShiftScale
from graphopt.passes.pass_manager import run_passes
from graphopt.quantization import Quantizer

pytestmark = pytest.mark.executorch

X = torch.randn(2, 3, 9, 10, generator=torch.Generator().manual_seed(0))


class Padded(nn.Module):
    """A convolution, padding of its result, and another one."""

    def __init__(self, padding: tuple[int, ...], second: nn.Module, **options: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), second
        self.padding, self.options = padding, options

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.pad(torch.relu(self.first(x)), self.padding, **self.options))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.left, self.right = nn.Conv2d(4, 4, 3, 2), nn.Conv2d(4, 4, 3, 2, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(self.first(x), (0, 1, 0, 1))
        return self.left(padded) + self.right(padded)


def quantized(model: nn.Module) -> Any:
    torch.manual_seed(0)
    quantizer = Quantizer(model.eval())
    quantizer.prepare((X,), dynamic_shapes=None, backend="executorch")
    quantizer.calibrate([(X,)])
    return quantizer.program().with_example((X,))


def legal(model: nn.Module) -> CapturedModule:
    gm = quantized(model).graph_module
    run_passes(gm, [DequantizeToShiftScale(), LegalizeForXNNPACK()])
    return gm  # type: ignore[no-any-return]


INSIDE = {
    "one side": lambda: Padded((0, 1, 0, 1), nn.Conv2d(4, 4, 3, 2)),
    "uneven": lambda: Padded((2, 1, 0, 3), nn.Conv2d(4, 6, 3)),
    "depthwise": lambda: Padded((0, 1, 1, 0), nn.Conv2d(4, 4, 3, groups=4)),
    "by name": lambda: Padded((1, 0), nn.Conv2d(4, 4, 3), mode="constant", value=0.0),
    "two readers": Twice,
}
OUTSIDE = {
    "ones": lambda: Padded((0, 1, 0, 1), nn.Conv2d(4, 4, 3), value=1.0),
    "channels": lambda: Padded((0, 1, 0, 1, 0, 1), nn.Conv2d(5, 4, 3)),
    "transposed": lambda: Padded((0, 1, 0, 1), nn.ConvTranspose2d(4, 4, 3)),
    "cut": lambda: Padded((0, -1, 0, 1), nn.Conv2d(4, 4, 3)),
    "mirrored": lambda: Padded((0, 1, 0, 1), nn.Conv2d(4, 4, 3), mode="reflect"),
    "pooled": lambda: Padded((0, 1, 0, 1), nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 4, 3))),
}


@pytest.mark.integration
@pytest.mark.parametrize("name", [*INSIDE, *OUTSIDE])
def test_padded_values_of_integers_are_within_a_step(name: str, tmp_path: Path) -> None:
    program = quantized((INSIDE | OUTSIDE)[name]())
    artifact: Any = graphopt.lower(program, "executorch")
    artifact.save(tmp_path / "net.pte")
    with torch.no_grad():
        wanted = program.graph_module(X)
    (output,) = program.graph_module.graph.find_nodes(op="output")
    step = output.args[0][0].args[1]
    assert artifact.verify().max_error * float(wanted.abs().max()) <= 1.01 * step
    if name in INSIDE:
        assert artifact.delegation.delegates == 1
        assert artifact.delegation.outside == {}


@pytest.mark.parametrize("name", INSIDE)
def test_rounding_behind_padding_goes_and_the_values_stay(name: str) -> None:
    gm = legal(INSIDE[name]())
    with torch.no_grad():
        wanted = gm(X)
    assert PadIntegers()(gm).modified
    gm.graph.eliminate_dead_code()
    gm.recompile()
    with torch.no_grad():
        assert torch.equal(gm(X), wanted)
    for conv in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default):
        if "pad" in str(conv.args[0]):
            assert len(conv.args[0].users) == 1


@pytest.mark.parametrize("name", OUTSIDE)
def test_other_padding_stays_rounded(name: str) -> None:
    gm = legal(OUTSIDE[name]())
    before = graph_text(gm)
    PadIntegers()(gm)
    assert graph_text(gm) == before


@pytest.mark.parametrize("name", INSIDE)
def test_second_run_changes_nothing(name: str) -> None:
    gm = legal(INSIDE[name]())
    PadIntegers()(gm)
    assert not PadIntegers()(gm).modified
