"""Compressed nets to tune, their data, and the error of their outputs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

import graphopt
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.ir.program import Program
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)

BLOCKS: tuple[Literal["auto", "whole"], ...] = ("auto", "whole")


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 24)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.first(x).relu()).relu()))


class CNN(nn.Module):
    """With norms, a residual sum and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm1(self.conv1(x)).relu()
        y = (y + self.norm2(self.conv2(y))).relu()
        y = self.up(y).relu()
        return self.head(y.mean((2, 3))), y


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(20, 8), nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.first(self.embed(ids)).relu().mean(1))


def cnn() -> CNN:
    model = CNN()
    for norm in (model.norm1, model.norm2):
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.3, 1.0)
    return model


def example(kind: str) -> tuple[nn.Module, list[Tensor]]:
    """A model and its data, the same at every call."""
    torch.manual_seed(0)
    if kind == "mlp":
        return MLP().eval(), [torch.randn(16, 8), torch.randn(24, 8), torch.randn(16, 8)]
    if kind == "embedding":
        return Embedded().eval(), [torch.randint(0, 20, (16, 5)) for _ in range(3)]
    return cnn().eval(), [torch.randn(6, 2, 6, 6), torch.randn(4, 2, 6, 6)]


def compressed(
    model: nn.Module, x: Tensor, spec: PalettizationSpec | None = None
) -> tuple[CompressedProgram, Program]:
    """A compressed program and its reference."""
    spec = spec or PalettizationSpec(n_bits=2)
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )
    reference = graphopt.capture(model, (x[:2],))
    palettizer = KMeansPalettizer(reference, config)
    palettizer.prepare(progress=False)
    return palettizer.program(), reference


def outputs(program: Program, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        made = program.graph_module(x)
    return list(made) if isinstance(made, tuple) else [made]


def output_error(program: Program, reference: Program, data: list[Tensor]) -> float:
    """Mean over batches of squared errors, relative to the variance of each output."""
    wanted = [outputs(reference, x) for x in data]
    scales = [
        torch.cat([each.flatten() for each in column]).var() for column in zip(*wanted, strict=True)
    ]
    total = 0.0
    for x, goals in zip(data, wanted, strict=True):
        made = outputs(program, x)
        for mine, goal, scale in zip(made, goals, scales, strict=True):
            total += float((mine - goal).square().mean() / scale)
    return total / len(data)


def changed(program: Program, other: Program) -> set[str]:
    mine, theirs = program.graph_module.state_dict(), other.graph_module.state_dict()
    assert mine.keys() == theirs.keys()
    return {name for name, value in mine.items() if not torch.equal(value, theirs[name])}
