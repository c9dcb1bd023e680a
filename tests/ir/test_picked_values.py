"""Ops that pick, sort or put side by side what they read: the scale of that is theirs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt.quantization import Quantizer

Function = Callable[[Tensor], Tensor]
ROW = torch.tensor([3, 1, 0])

PICKING: dict[str, Function] = {
    "index": lambda x: x[:, ROW],
    "gather": lambda x: x.gather(1, ROW.view(1, 3, 1, 1).expand(2, 3, 6, 6)),
    "take_along_dim": lambda x: torch.take_along_dim(x, ROW.view(1, 3, 1, 1), 1),
    "diagonal": lambda x: x.diagonal(0, 2, 3),
    "unfold": lambda x: x.unfold(2, 3, 2),
    "tensor_split": lambda x: x.tensor_split(3, 1)[1],
    "hsplit": lambda x: x.hsplit(2)[0],
    "unsafe_chunk": lambda x: torch.unsafe_chunk(x, 2, 1)[1],
    "swapaxes": lambda x: x.swapaxes(1, 3),
    "moveaxis": lambda x: x.moveaxis((1, 2), (3, 1)),
    "amax": lambda x: x.amax((2, 3)),
    "amin": lambda x: x.amin(1),
    "largest": lambda x: x.max(-1).values,
    "topk": lambda x: x.topk(2, -1).values,
    "sort": lambda x: x.sort(1).values,
    "kthvalue": lambda x: x.kthvalue(2, -1).values,
}
JOINING: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "hstack": torch.hstack,
    "vstack": torch.vstack,
    "dstack": torch.dstack,
    "column_stack": torch.column_stack,
    "concatenate": lambda xs: torch.concatenate(xs, 1),
}


class Picked(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.first, self.function = nn.Conv2d(3, 4, 1), function
        x = function(torch.randn(2, 4, 6, 6)).flatten(1)
        self.last = nn.Linear(x.shape[1], 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)).flatten(1))


class Joined(nn.Module):
    def __init__(self, function: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.function = function
        x = function([torch.randn(2, 4, 6, 6)] * 2).flatten(1)
        self.last = nn.Linear(x.shape[1], 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function([self.left(x), self.right(x)]).flatten(1))


def scales(model: nn.Module) -> tuple[list[float | None], float]:
    """Scales of activations that are found apart, and the error beside the result."""
    x = torch.randn(2, 3, 6, 6)
    quantizer = Quantizer(model.eval())
    quantizer.prepare((x,), dynamic_shapes=None)
    quantizer.calibrate([(x,)])
    used = [r.scale for r in quantizer.summary().activations if r.status == "quantized"]
    with torch.no_grad():
        wanted = model(x)
        error = (quantizer.program().graph_module(x) - wanted).norm() / wanted.norm()
    return used, float(error)


@pytest.mark.parametrize("name", PICKING)
def test_picked_values_keep_the_scale(name: str) -> None:
    torch.manual_seed(0)
    used, error = scales(Picked(PICKING[name]))
    assert len(used) == 2
    assert error < 0.03


@pytest.mark.parametrize("name", JOINING)
def test_joined_values_have_one_scale(name: str) -> None:
    torch.manual_seed(0)
    used, error = scales(Joined(JOINING[name]))
    assert len(set(used)) == 2
    assert error < 0.03
