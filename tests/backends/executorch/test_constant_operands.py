"""Weights and norms as XNNPACK's own rewrites find them, run on the ExecuTorch runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.together import in_groups, together
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import graphopt
from graphopt.backends.executorch.constant_operands import (
    ComputeWeights,
    Conv1dAsConv2d,
    OwnNormState,
)
from graphopt.passes.pass_manager import run_passes
from graphopt.quantization import Quantizer

pytestmark = pytest.mark.executorch


class Net(nn.Module):
    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def norm(kind: Any = nn.BatchNorm2d, channels: int = 4, affine: bool = True) -> nn.Module:
    made = kind(channels, affine=affine)
    made.running_var.uniform_(0.5, 4)
    made.running_mean.normal_()
    if affine:
        nn.init.uniform_(made.weight, 0.5, 2)
        nn.init.normal_(made.bias)
    return made  # type: ignore[no-any-return]


def by_gain() -> Net:
    return Net(
        lambda net, x: F.linear(x, net.w * net.g, net.b),
        w=weights(6, 4),
        g=weights(6, 1),
        b=weights(6),
    )


def with_lora() -> Net:
    return Net(
        lambda net, x: F.linear(x, net.w + net.up @ net.down, net.b),
        w=weights(6, 4),
        up=weights(6, 2),
        down=weights(2, 4),
        b=weights(6),
    )


def two_norms(layer: nn.Module) -> Net:
    return Net(
        lambda net, x: (net.m(net.layer(x)), net.n(net.layer(x * 2)), net.layer(x)),
        layer=layer,
        m=norm(),
        n=norm(),
    )


ROWS, IMAGE, WAVE = (3, 4), (1, 4, 6, 6), (2, 4, 9)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "gain": (by_gain, (ROWS,)),
    "low-rank sum": (with_lora, (ROWS,)),
    "weight norm": (lambda: weight_norm(nn.Conv1d(4, 6, 3)), (WAVE,)),
    "computed bias": (
        lambda: Net(lambda net, x: F.linear(x, net.w, net.b * 2), w=weights(6, 4), b=weights(6)),
        (ROWS,),
    ),
    "weight from an input": (
        lambda: Net(lambda net, x, w: F.linear(x, w * 2, net.b), b=weights(6)),
        (ROWS, (6, 4)),
    ),
    "kernel from an input": (
        lambda: Net(lambda net, x, w: F.conv1d(x, w * 2, net.b), b=weights(6)),
        (WAVE, (6, 4, 3)),
    ),
    "two norms": (lambda: two_norms(nn.Conv2d(4, 4, 1)), (IMAGE,)),
    "two norms, no bias": (lambda: two_norms(nn.Conv2d(4, 4, 1, bias=False)), (IMAGE,)),
    "one norm twice": (
        lambda: Net(lambda net, x: (net.m(net.c(x)), net.m(x)), c=nn.Conv2d(4, 4, 1), m=norm()),
        (IMAGE,),
    ),
    "no gain": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), norm(affine=False)), (IMAGE,)),
    "transposed in groups": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3, 2, groups=2), norm(channels=8)),
        (IMAGE,),
    ),
    "linear layer of three axes": (
        lambda: nn.Sequential(nn.Linear(9, 6), norm(nn.BatchNorm1d)),
        (WAVE,),
    ),
    "one kernel twice": (
        lambda: Net(lambda net, x: net.c(net.c(x)), c=nn.Conv1d(4, 4, 3)),
        (WAVE,),
    ),
}


def error_on_the_runtime(artifact: Any, folder: Path) -> float:
    artifact.save(folder / "net.pte")
    found: float = artifact.verification.max_error
    return found


@pytest.mark.integration
@pytest.mark.parametrize("names", in_groups(NETS, 5))
def test_runs_as_in_pytorch(names: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets = {}
    for name in names:
        build, shapes = NETS[name]
        nets[name] = (build(), tuple(torch.randn(shape) for shape in shapes))
    artifact = graphopt.lower(graphopt.capture(*together(nets, names)), "executorch")
    assert error_on_the_runtime(artifact, tmp_path) < 1e-5


ROUNDED: dict[str, Callable[[], nn.Module]] = {
    "gelu": lambda: nn.Sequential(nn.Conv1d(4, 4, 3, bias=False), nn.GELU()),
    "silu, glu": lambda: nn.Sequential(
        nn.Conv1d(4, 8, 3, padding="same"), nn.GLU(1), nn.Conv1d(4, 4, 1, groups=4), nn.SiLU()
    ),
    "uneven padding": lambda: nn.Sequential(nn.Conv1d(4, 8, 4, padding="same"), nn.Tanh()),
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), nn.GELU()
    ),
}


@pytest.mark.integration
def test_one_dimensional_convolutions_run_after_quantization(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets = {name: (build(), (torch.randn(WAVE),)) for name, build in ROUNDED.items()}
    model, x = together(nets, nets)
    quantizer = Quantizer(model)
    quantizer.prepare(x, backend="executorch")
    quantizer.calibrate([x])
    artifact = graphopt.lower(quantizer.program(), "executorch")
    assert error_on_the_runtime(artifact, tmp_path) < 1e-2


@pytest.mark.parametrize("step", [ComputeWeights(), OwnNormState(), Conv1dAsConv2d()])
def test_ordinary_networks_stay_as_they_are(step: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    program = graphopt.capture(model.eval(), (torch.randn(IMAGE),))
    assert not run_passes(program.graph_module, [step])


def test_computed_weights_become_constants_once() -> None:
    program = graphopt.capture(by_gain().eval(), (torch.randn(ROWS),))
    assert run_passes(program.graph_module, [ComputeWeights()])
    calls = [node for node in program.graph_module.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [torch.ops.aten.linear.default]
    assert not run_passes(program.graph_module, [ComputeWeights()])
