"""CorrectBias: every layer gets the mean output of the reference."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.statistics_nets import conv_norm, graph_of, images, layout, palettized
from helpers.tiers import some
from torch import Tensor, fx, nn

from graphopt.errors import CalibrationError
from graphopt.passes import CorrectBias

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder(fx.Interpreter):
    """Values of all nodes of a graph, by the graph's own semantics."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n.name] = super().run_node(n)
        return self.seen[n.name]


def channel_means(gm: fx.GraphModule, node: str, data: Sequence[Tensor], axis: int) -> Tensor:
    made = []
    for x in data:
        recorder = Recorder(gm)
        with torch.no_grad():
            recorder.run(x)
        made.append(recorder.seen[node].double().movedim(axis, -1).flatten(0, -2))
    return torch.cat(made).mean(0)


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.second = nn.Linear(12, 12, bias=False)
        self.third = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).relu())


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.ConvTranspose2d(8, 6, 2, 2, bias=False)
        self.third = nn.Conv2d(6, 6, 3, padding="same", groups=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).relu())


class Generals(nn.Module):
    """`aten.convolution`: plain without a bias, transposed, and in groups."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(6, 6, 3, groups=3))
        self.layers = nn.ModuleList(layers)
        self.layers[0].bias = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            turned = isinstance(layer, nn.ConvTranspose2d)
            places = (layer.stride, [0, 0], [1, 1], turned, [0, 0], layer.groups)
            x = torch.ops.aten.convolution(x.relu(), layer.weight, layer.bias, *places)
        return x


class Addmms(nn.Module):
    """Linear layers as decompositions write them, weights not turned."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(6, 6) / 3 for _ in range(3))
        self.biases = nn.ParameterList(torch.randn(6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = torch.addmm(bias, x.relu(), weight)
        return x


NETS: dict[str, tuple[type[nn.Module], list[Tensor], int]] = {
    "linear": (Linears, [torch.randn(5, 6) + 1, torch.randn(9, 6) + 1], -1),
    "linear over tokens": (Linears, [torch.randn(2, 7, 6) + 1, torch.randn(3, 4, 6) + 1], -1),
    "general convolution": (
        Generals,
        [torch.randn(3, 3, 7, 7) + 1, torch.randn(5, 3, 7, 7) + 1],
        1,
    ),
    "addmm": (Addmms, [torch.randn(5, 6) + 1, torch.randn(9, 6) + 1], -1),
    "convolution": (Convs, [torch.randn(3, 3, 7, 7) + 1, torch.randn(5, 3, 7, 7) + 1], 1),
}


@pytest.mark.integration
@pytest.mark.parametrize("kind", some(NETS, lambda kind: kind in list(NETS)[::2]))
def test_every_layer_gets_the_mean_output_of_the_reference(kind: str) -> None:
    make, data, axis = NETS[kind]
    model = make()
    gm, reference = palettized(model, data[0], n_bits=1), graph_of(model, data[0])
    layers = [
        node.name
        for node in gm.graph.nodes
        if any(part in str(node.target) for part in ("linear", "conv", "addmm"))
    ]
    assert len(layers) == 3

    def worst() -> list[float]:
        moved = [
            channel_means(gm, each, data, axis) - channel_means(reference, each, data, axis)
            for each in layers
        ]
        return [float(each.abs().max()) for each in moved]

    assert min(worst()) > 1e-3
    assert CorrectBias(data, reference)(gm).modified
    gm.graph.lint()
    assert max(worst()) < 1e-5


def opposed(count: int = 16) -> list[Tensor]:
    """Batches whose means are far apart, so that what one says is wrong for the others."""
    generator = torch.Generator().manual_seed(0)
    places = (6 * torch.eye(6)).repeat_interleave(2, 0) * torch.tensor([1.0, -1.0] * 6)[:, None]
    return [place + 0.1 * torch.randn(count, 6, generator=generator) for place in places]


def test_correction_that_other_batches_do_not_confirm_is_left_out() -> None:
    torch.manual_seed(3)
    model, data = nn.Sequential(nn.Linear(6, 12)), opposed()
    gm, reference = palettized(model, data[0], n_bits=1), graph_of(model, data[0])

    def error(module: nn.Module, batch: Tensor) -> float:
        with torch.no_grad():
            return float((module(batch) - reference(batch)).square().mean())

    before = copy.deepcopy(gm)
    CorrectBias(data[:1], reference)(gm)
    # one batch alone is taken at its word, and the others suffer
    assert error(gm, data[0]) < error(before, data[0])
    other = copy.deepcopy(before)
    CorrectBias(data, reference)(other)
    for batch in data:
        assert error(other, batch) <= error(before, batch) * (1 + 1e-6)


class Cancelling(nn.Module):
    """Two layers whose errors make up for each other, where a bias can be moved in one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        with torch.no_grad():
            self.right.weight.copy_(-self.left.weight)
        self.right.bias = self.left.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + F.linear(x, self.right.weight, torch.zeros(6))


def test_corrections_that_move_the_outputs_away_are_taken_back() -> None:
    torch.manual_seed(0)
    model, x = Cancelling(), torch.randn(64, 6) + 3
    gm, reference = palettized(model, x, n_bits=1), graph_of(model, x)
    state = copy.deepcopy(gm.state_dict())
    with torch.no_grad():
        before = float((gm(x) - reference(x)).square().mean())
        CorrectBias([x], reference)(gm)
        after = float((gm(x) - reference(x)).square().mean())
    assert after <= before
    if after == before:
        assert torch.equal(gm.state_dict()["left.bias"], state["left.bias"])


def test_layer_without_a_bias_gets_one_under_its_own_name() -> None:
    model, data = Linears(), [torch.randn(8, 6) + 1]
    gm = palettized(model, data[0])
    assert "second.bias" not in gm.state_dict()
    CorrectBias(data, graph_of(model, data[0]))(gm)
    assert gm.state_dict()["second.bias"].shape == (12,)
    assert "second.bias" not in model.state_dict()
    copied = copy.deepcopy(gm)
    torch.testing.assert_close(copied(data[0]), gm(data[0]), rtol=0, atol=0)


def test_codes_tables_and_the_callers_model_stay_and_the_order_of_data_does_not_matter() -> None:
    model, data = Linears(), [torch.randn(8, 6) + 1, torch.randn(3, 6)]
    before = copy.deepcopy(model.state_dict())
    gm, other = palettized(model, data[0]), palettized(model, data[0])
    state = copy.deepcopy(gm.state_dict())
    CorrectBias(data, graph_of(model, data[0]))(gm)
    CorrectBias(data[::-1], graph_of(model, data[0]))(other)
    for name, value in gm.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-6, atol=1e-7)
        if not name.endswith("bias"):
            assert torch.equal(value, state[name]), name
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_second_correction_finds_nothing_to_correct() -> None:
    model, data = Linears(), [torch.randn(8, 6) + 1]
    gm, reference = palettized(model, data[0]), graph_of(model, data[0])
    CorrectBias(data, reference)(gm)
    once = copy.deepcopy(gm.state_dict())
    CorrectBias(data, reference)(gm)
    for name, value in gm.state_dict().items():
        torch.testing.assert_close(value, once[name], rtol=1e-5, atol=1e-6)


def test_layers_in_front_of_a_norm_are_left_to_the_norm() -> None:
    model, x = conv_norm(), images(6)
    gm = palettized(model, x)
    nodes, state = layout(gm), copy.deepcopy(gm.state_dict())
    assert not CorrectBias([x], graph_of(model, x))(gm).modified
    assert layout(gm) == nodes
    for name, value in gm.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_uncompressed_layers_are_left_alone() -> None:
    model, x = Linears(), torch.randn(4, 6)
    assert not CorrectBias([], graph_of(model, x))(graph_of(model, x)).modified


class SharedBias(nn.Module):
    """One bias for two layers, as one parameter or under two names."""

    def __init__(self, *, two_names: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.own = nn.Linear(6, 6)
        self.two_names = two_names
        if two_names:
            self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        bias = self.second.bias if self.two_names else self.first.bias
        return self.own(F.linear(y, self.second.weight, bias).relu())


@pytest.mark.parametrize("two_names", [False, True])
def test_bias_that_two_layers_share_is_left_alone(two_names: bool) -> None:
    model, x = SharedBias(two_names=two_names), torch.randn(8, 6) + 1
    gm = palettized(model, x)
    CorrectBias([x], graph_of(model, x))(gm)
    assert torch.equal(gm.state_dict()["first.bias"], model.first.bias)
    if two_names:
        assert torch.equal(gm.state_dict()["second.bias"], model.first.bias)
    assert not torch.equal(gm.state_dict()["own.bias"], model.own.bias)


def test_biases_cannot_be_corrected_without_data() -> None:
    model, x = Linears(), torch.randn(4, 6)
    with pytest.raises(CalibrationError, match="no data"):
        CorrectBias([], graph_of(model, x))(palettized(model, x))
