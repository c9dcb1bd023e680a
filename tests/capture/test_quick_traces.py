from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import proxy

from graphopt.capture.quick_traces import quick_traces


def _doubled(x: Tensor) -> Tensor:
    return (lambda y: y + y)(x)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(3))
        self.norm, self.attention = nn.LayerNorm(6), nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = _doubled(layer(x))
        x = torch.stack([part.tanh() for part in x.split(2)]).flatten(0, 1)
        x = self.attention(x, x, x)[0] * 2
        return self.norm(x)


def _lines(model: nn.Module, x: Tensor) -> list[tuple[str, Any]]:
    exported = torch.export.export(model, (x,), strict=False)
    return [(node.name, node.meta.get("stack_trace")) for node in exported.graph.nodes]


def test_lines_are_those_of_torch() -> None:
    model, x = _Net().eval(), torch.randn(4, 6)
    expected = _lines(model, x)
    with quick_traces():
        found = _lines(model, x)
    assert found == expected
    assert sum("x = _doubled(layer(x))" in (text or "") for _, text in found) == 9


def test_whole_stacks_are_those_of_torch() -> None:
    def inner() -> tuple[Any, Any]:
        return torch_s.extract().summary(), proxy.CapturedTraceback.extract().summary()

    torch_s: Any = proxy.CapturedTraceback
    with quick_traces():
        theirs, ours = [inner() for _ in range(2)][1]
    assert [(f.filename, f.name) for f in ours] == [(f.filename, f.name) for f in theirs]
    assert [f.lineno for f in ours] == [f.lineno for f in theirs]
    assert ours.format() == theirs.format()
    assert proxy.CapturedTraceback is torch_s


def test_other_stacks_are_torchs_own() -> None:
    with quick_traces():
        stack = proxy.CapturedTraceback.extract(skip=1)
    assert type(stack).__module__ == "torch.utils._traceback"
