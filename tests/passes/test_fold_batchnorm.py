from __future__ import annotations

import pytest
import torch
import zoo
from helpers.tiers import cases
from torch import Tensor, nn

import graphopt
from graphopt.passes import FoldBatchNorm, RemoveUnused
from graphopt.passes.pass_manager import run_passes

aten = torch.ops.aten
CONVS = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "same": (nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (2, 4, 9, 9)),
    "conv3d": (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 2, 2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed groups": (
        nn.ConvTranspose2d(4, 6, 2, 2, groups=2, bias=False),
        nn.BatchNorm2d(6),
        (2, 4, 5, 5),
    ),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d(6), (2, 4, 4, 4, 4)),
    "no affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 9, 9)),
}


def norms(gm: torch.fx.GraphModule) -> int:
    return sum("batch_norm" in str(node.target) for node in gm.graph.nodes)


def with_statistics(norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.3, 3.0)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("name", CONVS)
def test_outputs_are_equal_and_the_norm_is_gone(name: str) -> None:
    conv, norm, shape = CONVS[name]
    model = nn.Sequential(conv, with_statistics(norm), nn.ReLU()).eval()
    x = torch.randn(shape)
    gm = graphopt.capture(model, (x,)).copy().graph_module
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert run_passes(gm, [FoldBatchNorm(), RemoveUnused()])
    assert norms(gm) == 0
    torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-5)
    assert set(gm.state_dict()) == {"0.weight", "0.bias"}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not FoldBatchNorm()(gm).modified


class General(nn.Module):
    """`aten.convolution`, as other exporters write every convolution, and a batch norm."""

    def __init__(self, *, transposed: bool, groups: int, bias: bool) -> None:
        super().__init__()
        shape = (4, 6 // groups, 3, 3) if transposed else (6, 4 // groups, 3, 3)
        self.weight = nn.Parameter(torch.randn(shape) / 6)
        self.bias = nn.Parameter(torch.randn(6)) if bias else None
        self.norm = with_statistics(nn.BatchNorm2d(6))
        self.transposed, self.groups = transposed, groups

    def forward(self, x: Tensor) -> Tensor:
        places = ([2, 1], [1, 0], [1, 2], self.transposed, [0, 0], self.groups)
        return self.norm(torch.ops.aten.convolution(x, self.weight, self.bias, *places))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_norm_behind_the_general_convolution_is_folded(
    transposed: bool, groups: int, bias: bool
) -> None:
    model, x = (
        General(transposed=transposed, groups=groups, bias=bias).eval(),
        torch.randn(2, 4, 9, 9),
    )
    gm = graphopt.capture(model, (x,)).copy().graph_module
    (conv,) = [node for node in gm.graph.nodes if node.target is aten.convolution.default]
    run_passes(gm, [FoldBatchNorm(), RemoveUnused()])
    assert norms(gm) == 0
    assert conv in gm.graph.nodes
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-5)
    assert set(gm.state_dict()) == {"weight", "bias"}


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class Twice(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv(x)))


class Alone(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.relu())


@pytest.mark.parametrize("kind", [Shared, Twice, Alone])
def test_norms_that_cannot_be_folded_are_left_alone(kind: type[nn.Module]) -> None:
    model, x = kind().eval(), torch.randn(2, 4, 6, 6)
    gm = graphopt.capture(model, (x,)).copy().graph_module
    assert not FoldBatchNorm()(gm).modified
    torch.testing.assert_close(gm(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    cases(
        ["resnet", "centernet", "mobilenet_v3_small"],
        default=lambda name: name == "mobilenet_v3_small",
    ),
)
def test_whole_networks_keep_their_outputs(name: str) -> None:
    model, args = zoo.MODELS[name]()
    gm = graphopt.capture(model, args).copy().graph_module
    FoldBatchNorm()(gm)
    assert norms(gm) == 0
    found, expected = gm(*args), model(*args)
    for mine, theirs in zip(
        *[o if isinstance(o, tuple) else (o,) for o in (found, expected)], strict=False
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
