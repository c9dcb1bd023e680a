from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.passes import FoldPadding

Between = Callable[[Tensor], Tensor]


class _Net(nn.Module):
    """An op between a ReLU and a convolution."""

    def __init__(self, between: Between, conv: nn.Module, ndim: int = 2) -> None:
        super().__init__()
        kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        self.first, self.between, self.conv = kinds[ndim](3, 4, 1), between, conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.between(torch.relu(self.first(x))))


def _pads(gm: Any) -> int:
    return sum(node.op == "call_function" and "pad" in node.name for node in gm.graph.nodes)


def _folded(net: nn.Module, x: Tensor) -> int:
    """How many paddings are left; the net computes what it did."""
    program = graphopt.capture(net.eval(), x)
    gm = program.graph_module
    with torch.no_grad():
        expected = net(x)
        FoldPadding()(gm)
        gm.graph.lint()
        torch.testing.assert_close(gm(x), expected)
    assert not FoldPadding()(gm).modified
    return _pads(gm)


CONVS: dict[str, tuple[int, nn.Module, list[int]]] = {
    "plain": (2, nn.Conv2d(4, 5, 3), [1, 1, 1, 1]),
    "padded, strided": (2, nn.Conv2d(4, 5, 3, 2, 1, bias=False), [2, 2, 1, 1]),
    "one axis": (2, nn.Conv2d(4, 5, 3, padding=(0, 1)), [0, 0, 3, 3]),
    "the last axis alone": (2, nn.Conv2d(4, 4, 3, groups=4), [2, 2]),
    "dilated": (1, nn.Conv1d(4, 5, 3, dilation=2), [2, 2]),
    "with zeros for the channels": (2, nn.Conv2d(4, 5, 3), [1, 1, 1, 1, 0, 0]),
    "three axes": (3, nn.Conv3d(4, 5, 2), [1, 1, 0, 0, 2, 2]),
    "nothing": (2, nn.Conv2d(4, 5, 3), [0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", list(CONVS))
def test_convolutions_pad_as_much_more(name: str) -> None:
    ndim, conv, amounts = CONVS[name]
    net = _Net(lambda x: F.pad(x, amounts), conv, ndim)
    assert _folded(net, torch.randn(2, 3, *[9] * ndim)) == 0


STAY: dict[str, tuple[nn.Module, Between]] = {
    "sides that differ": (nn.Conv2d(4, 5, 3), lambda x: F.pad(x, (0, 1, 0, 1))),
    "another value": (nn.Conv2d(4, 5, 3), lambda x: F.pad(x, (1, 1, 1, 1), value=0.5)),
    "reflection": (nn.Conv2d(4, 5, 3), nn.ReflectionPad2d(1)),
    "replication": (nn.Conv2d(4, 5, 3), nn.ReplicationPad2d(1)),
    "a crop": (nn.Conv2d(4, 5, 3), lambda x: F.pad(x, (-1, -1, -1, -1))),
    "channels": (nn.Conv2d(6, 5, 3), lambda x: F.pad(x, (1, 1, 1, 1, 1, 1))),
    "the same size": (nn.Conv2d(4, 5, 3, padding="same"), lambda x: F.pad(x, (1, 1, 1, 1))),
    "a transposed one": (nn.ConvTranspose2d(4, 5, 3), lambda x: F.pad(x, (1, 1, 1, 1))),
    "another reader": (nn.Conv2d(4, 5, 3), lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3)),
}


@pytest.mark.parametrize("name", list(STAY))
def test_padding_stays_that_a_convolution_cannot_say(name: str) -> None:
    conv, between = STAY[name]
    assert _folded(_Net(between, conv), torch.randn(2, 3, 9, 9)) == 1


class _Twice(nn.Module):
    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        padded = F.pad(x, (1, 1, 1, 1))
        return self.first(padded), self.second(padded)


@pytest.mark.parametrize(("second", "left"), [(nn.Conv2d(3, 4, 5), 0), (nn.ReLU(), 1)])
def test_all_readers_have_to_be_convolutions(second: nn.Module, left: int) -> None:
    net, x = _Twice(second).eval(), torch.randn(1, 3, 8, 8)
    gm = graphopt.capture(net, x).graph_module
    FoldPadding()(gm)
    assert _pads(gm) == left
    for found, expected in zip(gm(x), net(x), strict=True):
        torch.testing.assert_close(found, expected)


class _Delayed(nn.Module):
    """Gives what it was given at the call before."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(1, 2, 6))

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(self.last.transpose(1, 2), (0, 0))
        self.last.copy_(x)
        return before


def test_a_copy_of_a_state_stays_one() -> None:
    net, calls = _Delayed().eval(), torch.randn(3, 1, 2, 6)
    gm = graphopt.capture(copy.deepcopy(net), calls[0]).graph_module
    FoldPadding()(gm)
    for x in calls:
        assert torch.equal(gm(x), net(x))


SHARED: dict[str, Between] = {
    "zeros on one side": lambda x: F.pad(x, (0, 1, 0, 1)),
    "reflection": nn.ReflectionPad2d(1),
    "replication": nn.ReplicationPad2d(1),
    "tile": lambda x: x.tile(1, 1, 2, 1),
    "nearest": nn.Upsample(scale_factor=2, mode="nearest-exact"),
}


@pytest.mark.parametrize("name", list(SHARED))
def test_values_that_only_move_are_rounded_with_one_scale(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    net = _Net(SHARED[name], nn.Conv2d(4, 5, 3)).eval()
    program = graphopt.compress(net, x, {"quantization": {}}, calibration_data=[x])
    rounded = program.graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.quantized_decomposed.quantize_per_tensor.default
    )
    # the input, and behind the ReLU once before and once behind the op
    scales = [(node.args[1], node.args[2]) for node in rounded]
    assert len(scales) == 3
    assert len(set(scales)) == 2


def test_padding_with_another_value_has_a_scale_of_its_own() -> None:
    x = torch.randn(2, 3, 9, 9)
    net = _Net(lambda x: F.pad(x, (1, 1, 1, 1), value=9.0), nn.Conv2d(4, 5, 3)).eval()
    program = graphopt.compress(net, x, {"quantization": {}}, calibration_data=[x])
    rounded = program.graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.quantized_decomposed.quantize_per_tensor.default
    )
    assert len({(node.args[1], node.args[2]) for node in rounded}) == 3


@pytest.mark.executorch
def test_a_padded_network_of_integers_is_one_delegate() -> None:
    x = torch.randn(1, 3, 16, 16)
    net = nn.Sequential(
        *(nn.ZeroPad2d(1), nn.Conv2d(3, 8, 3, 2), nn.ReLU()),
        *(nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6()),
        *(nn.ZeroPad2d(0), nn.Conv2d(8, 4, 1)),
    ).eval()
    program = graphopt.compress(
        net, x, {"quantization": {}}, calibration_data=[x], backend="executorch"
    )
    delegation = graphopt.lower(program, "executorch").delegation
    assert delegation.delegates == 1
    assert not delegation.outside
