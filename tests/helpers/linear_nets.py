"""Two linear layers, captured and annotated."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt.ir.captured_module import CapturedModule
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.passes import (
    AnnotatePalettization,
)

# its own generator: whoever imports this first draws the same
_DRAWN = torch.Generator().manual_seed(0)
X = torch.randn(2, 6, generator=_DRAWN)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.out = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(x)))


def captured() -> CapturedModule:
    return graphopt.capture(Net().eval(), (X,)).graph_module


def ops(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def annotate() -> AnnotatePalettization:
    return AnnotatePalettization(KMeansPalettizerConfig())
