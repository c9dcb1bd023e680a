"""AbsorbChannelScale: channels get one spread, outputs stay."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.statistics_nets import graph_of, images, layout
from torch import Tensor, nn

from graphopt.numerics.kmeans1d import cluster_1d
from graphopt.passes import AbsorbChannelScale

pytestmark = pytest.mark.usefixtures("one_thread")


CONVS: dict[str, tuple[Callable[[], nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "without bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d, (2, 4, 7, 7)),
    "with bias": (lambda: nn.Conv2d(4, 6, 3), nn.BatchNorm2d, (2, 4, 7, 7)),
    "one dimension": (lambda: nn.Conv1d(4, 6, 3), nn.BatchNorm1d, (2, 4, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d, (2, 4, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, 2), nn.BatchNorm2d, (2, 4, 5, 5)),
    "transposed without bias": (
        lambda: nn.ConvTranspose2d(4, 6, 2, 2, bias=False),
        nn.BatchNorm2d,
        (2, 4, 5, 5),
    ),
}


def with_gains(conv: nn.Module, norm: type[nn.Module], *, eps: float = 1e-5) -> nn.Sequential:
    """A convolution whose channels differ in scale, and a norm that expects that."""
    axis = 1 if isinstance(conv, nn.ConvTranspose2d) else 0
    channels = conv.weight.shape[axis]
    gain = torch.logspace(-1, 1, channels)
    shape = [1] * conv.weight.ndim
    shape[axis] = channels
    behind = norm(channels, eps=eps)
    with torch.no_grad():
        conv.weight *= gain.reshape(shape)
        if conv.bias is not None:
            conv.bias.uniform_(-1, 1)
        behind.running_mean.normal_().mul_(gain)
        behind.running_var.uniform_(0.3, 3.0).mul_(gain.square())
        behind.weight.uniform_(-2, 2)
        behind.bias.normal_()
    return nn.Sequential(conv, behind, nn.ReLU()).eval()


def channel_rms(weight: Tensor, axis: int) -> Tensor:
    return weight.detach().double().movedim(axis, 0).flatten(1).square().mean(1).sqrt()


@pytest.mark.parametrize("name", CONVS)
def test_outputs_stay_and_channels_get_one_spread(name: str) -> None:
    make, norm, shape = CONVS[name]
    model, x = with_gains(make(), norm), torch.randn(shape)
    axis = 1 if "transposed" in name else 0
    before = copy.deepcopy(model.state_dict())
    gm = graph_of(model, x)
    nodes = layout(gm)
    assert AbsorbChannelScale()(gm).modified
    gm.graph.lint()
    assert layout(gm) == nodes
    assert set(gm.state_dict()) >= {"0.weight", "1.running_mean", "1.running_var"}
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-5)
    old = channel_rms(before["0.weight"], axis)
    spread = channel_rms(gm.state_dict()["0.weight"], axis)
    assert float(old.max() / old.min()) > 20
    torch.testing.assert_close(spread, spread[:1].expand_as(spread), rtol=1e-6, atol=0)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_quiet_and_dead_channels_keep_variances_at_or_above_zero(eps: float) -> None:
    model = with_gains(nn.Conv2d(4, 6, 3), nn.BatchNorm2d, eps=eps)
    with torch.no_grad():
        model[0].weight[0] = 0
        if eps:
            model[1].running_var[4] = 0
            model[1].running_var[5] = 1e-6
    x = torch.randn(2, 4, 7, 7)
    gm = graph_of(model, x)
    AbsorbChannelScale()(gm)
    assert float(gm.state_dict()["1.running_var"].min()) >= 0
    assert all(bool(value.isfinite().all()) for value in gm.state_dict().values())
    scale = float(model(x).detach().abs().max())
    torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-5 * scale)


def test_one_table_serves_channels_of_different_gain_better() -> None:
    model, x = with_gains(nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d), torch.randn(2, 8, 5, 5)
    gm = graph_of(model, x)
    AbsorbChannelScale()(gm)

    def error(module: nn.Module) -> float:
        """Relative squared error of the weight that weight and norm are together."""
        state = {name: value.double() for name, value in module.state_dict().items()}
        gain = state["1.weight"] / (state["1.running_var"] + 1e-5).sqrt()
        weight = state["0.weight"]
        table = cluster_1d(weight.float().reshape(1, -1), [8], method="exact")[8].dense()
        change = (table.double().reshape(weight.shape) - weight) * gain.reshape(-1, 1, 1, 1)
        folded = weight * gain.reshape(-1, 1, 1, 1)
        return float(change.square().sum() / folded.square().sum())

    assert error(gm) < 0.5 * error(model)


class SecondReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class SharedConv(SecondReader):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.other(self.conv(2 * x))


class SharedNorm(SecondReader):
    """One norm behind two convolutions: its statistics cannot follow both."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.other(x))


@pytest.mark.parametrize("kind", [SecondReader, SharedConv, SharedNorm])
def test_convolutions_and_norms_with_other_readers_are_left_alone(kind: type[nn.Module]) -> None:
    model, x = kind().eval(), images(2)
    with torch.no_grad():
        model.conv.weight *= torch.logspace(-1, 1, 6).reshape(-1, 1, 1, 1)
    gm = graph_of(model, x)
    modified = AbsorbChannelScale()(gm).modified
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-5)
    assert not modified


def test_grouped_transposed_convolution_is_left_alone() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6)).eval()
    assert not AbsorbChannelScale()(graph_of(model, torch.randn(2, 4, 5, 5))).modified
