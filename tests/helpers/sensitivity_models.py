"""Models with every kind of weight, their data, and gradients collected of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.analysis.weights import find_weights
from graphopt.fitting.sensitivity import (
    GradientCollector,
)
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.program import Program
from graphopt.passes import InsertTaps
from graphopt.passes.pass_manager import run_passes

Data = tuple[Tensor, Tensor]  # inputs and targets of all samples


BATCH = 6


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 8, 3, padding="same", groups=4)
        self.grouped = nn.Conv2d(8, 6, (1, 3), groups=2, dilation=2, padding=(0, 2))
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x)).relu()
        y = self.grouped(self.depthwise(y).tanh()) * 2
        return self.head(self.up(y).square().mean((2, 3)))


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Parameter(torch.randn(5, 5))
        self.fc = nn.Linear(4, 6)
        self.right = nn.Parameter(torch.randn(6, 4))
        self.conv = nn.Conv1d(4, 4, 3, padding=1, bias=False)
        self.turned = nn.Parameter(torch.randn(4, 3))

    def forward(self, ids: Tensor) -> Tensor:
        x = (self.mix @ self.embed(ids)).tanh()
        x = self.fc(x).tanh() @ self.right
        x = self.conv(x.mT).mT
        return F.linear(x, self.turned.t()).mean(1)


def images() -> Data:
    return torch.randn(BATCH, 3, 8, 8), torch.randint(0, 3, (BATCH,))


def tokens(classes: int = 3) -> Data:
    ids = torch.randint(0, 7, (BATCH, 5))
    ids[:, 3] = ids[:, 1]  # every sample repeats a token
    return ids, torch.randint(0, classes, (BATCH,))


def losses(output: Tensor, target: Tensor) -> Tensor:
    """One per sample; large, so that gradients are."""
    return 10 * F.cross_entropy(output, target, reduction="none")


def prepared(model: nn.Module, x: Tensor) -> Program:
    return graphopt.capture(model.eval(), (x,))


def collect(
    program: Program, data: Data, sizes: Sequence[int], collector: GradientCollector
) -> dict[str, Tensor]:
    """Watch backward passes of the mean loss over batches of these sizes."""
    gm = tapped(program, collector)
    x, target = data
    for inputs, wanted in zip(x.split(list(sizes)), target.split(list(sizes)), strict=True):
        collector.scale = float(len(inputs))
        losses(gm(inputs), wanted).mean().backward()
        collector.samples += len(inputs)
    return collector.finish()


def tapped(program: Program, collector: GradientCollector) -> CapturedModule:
    gm = program.copy().graph_module
    names = [weight.name for weight in find_weights(gm) if weight.tensor.ndim > 1]
    assert run_passes(gm, [InsertTaps(collector, names)])
    return gm


def one_by_one(model: nn.Module, data: Data) -> dict[str, Tensor]:
    """Mean over samples of the squared gradient of a sample's loss, in float64."""
    wide = copy.deepcopy(model).eval().double()
    names = {name: value for name, value in wide.named_parameters() if value.ndim > 1}
    sums = {name: torch.zeros_like(value) for name, value in names.items()}
    x, target = data
    for number in range(len(x)):
        own = x[number : number + 1]
        loss = losses(wide(own.double() if own.is_floating_point() else own), target[number, None])
        gradients = torch.autograd.grad(loss.sum(), list(names.values()))
        for name, gradient in zip(names, gradients, strict=True):
            sums[name] += gradient.square()
    return {name: value / len(x) for name, value in sums.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert float(value.abs().max()) > 1e-6, name
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=1e-3, atol=1e-5 * float(value.max())
        )


MODELS: dict[str, tuple[type[nn.Module], Callable[[], Data]]] = {
    "convolutions": (Convolutions, images),
    "sequences": (Sequences, tokens),
}


@cache
def example(name: str) -> tuple[nn.Module, Data, Program]:
    kind, make = MODELS[name]
    torch.manual_seed(1)
    model, data = kind().eval(), make()
    return model, data, prepared(model, data[0])
