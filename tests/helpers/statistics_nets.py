"""Compressed graphs, means of channels, small nets with norms."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt.ir.captured_module import CapturedModule
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)


def graph_of(model: nn.Module, x: Tensor) -> CapturedModule:
    return graphopt.capture(model.eval(), (x,)).copy().graph_module


def palettized(model: nn.Module, x: Tensor, n_bits: int = 2) -> CapturedModule:
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(
            op_state_spec={"weight": PalettizationSpec(n_bits=n_bits)}
        )
    )
    palettizer = KMeansPalettizer(model, config)
    palettizer.prepare((x,), progress=False)
    return palettizer.program().graph_module


def layout(gm: fx.GraphModule) -> list[tuple[str, str, str]]:
    return [(node.op, node.name, str(node.target)) for node in gm.graph.nodes]


class ConvNorm(nn.Module):
    """Three convolutions with norms, the last one behind a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 6, 1)
        self.norm3 = nn.BatchNorm2d(6, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        y = y + self.norm2(self.conv2(y)).relu()
        return self.norm3(self.conv3(y)).mean((2, 3))


def conv_norm(seed: int = 0) -> ConvNorm:
    torch.manual_seed(seed)
    model = ConvNorm()
    for norm in (model.norm1, model.norm2, model.norm3):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3.0)
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return model.eval()


def images(count: int, seed: int = 1, size: int = 6) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
