"""Mean squared gradients per sample against a loop of autograd."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.sensitivity_models import (
    BATCH,
    MODELS,
    Data,
    assert_close,
    collect,
    example,
    losses,
    one_by_one,
    prepared,
    tapped,
    tokens,
)
from torch import Tensor, nn

from graphopt.fitting.sensitivity import (
    GradientCollector,
)


class Tied(nn.Module):
    """An embedding that also reads the logits out, a matrix that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.shared = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.shared(self.shared(self.embed(ids)).tanh())
        return (x @ self.embed.weight.T).mean(1)


class Untied(nn.Module):
    """The same with a tensor of its own for every use."""

    def __init__(self, tied: Tied) -> None:
        super().__init__()
        self.embed = copy.deepcopy(tied.embed)
        self.first, self.second = copy.deepcopy(tied.shared), copy.deepcopy(tied.shared)
        self.out = nn.Parameter(tied.embed.weight.detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.second(self.first(self.embed(ids)).tanh())
        return (x @ self.out.T).mean(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.fc(x))[0][:, -1]


def vectors() -> Data:
    return torch.randn(BATCH, 5, 4), torch.randint(0, 3, (BATCH,))


@pytest.mark.parametrize("name", MODELS)
def test_sums_are_those_of_a_loop_over_samples(name: str) -> None:
    model, data, program = example(name)
    found = collect(program, data, [BATCH], GradientCollector())
    assert_close(found, one_by_one(model, data))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("convolutions", [1] * BATCH),
        ("convolutions", [5, 1]),
        ("sequences", [2, 2, 2]),
        ("sequences", [4, 2]),
    ],
)
def test_the_size_of_the_batches_does_not_matter(name: str, sizes: list[int]) -> None:
    _, data, program = example(name)
    whole = collect(program, data, [BATCH], GradientCollector())
    assert_close(collect(program, data, sizes, GradientCollector()), whole)


def test_uses_of_a_tied_weight_add_up_their_squares() -> None:
    model, data = Tied(), tokens(7)
    found = collect(prepared(model, data[0]), data, [BATCH], GradientCollector())
    each = one_by_one(Untied(model), data)
    expected = {
        "embed.weight": each["embed.weight"] + each["out"],
        "shared.weight": each["first.weight"] + each["second.weight"],
    }
    assert_close(found, expected)


def test_a_token_that_a_sample_repeats_counts_as_the_square_of_its_sum() -> None:
    model = nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(6, 3)).eval()
    data = torch.tensor([[1, 1, 2], [0, 1, 2]]), torch.tensor([0, 2])
    found = collect(prepared(model, data[0]), data, [2], GradientCollector())
    expected = one_by_one(model, data)
    assert_close(found, expected)
    assert not bool(found["0.weight"][3].any())


def test_weights_of_a_recurrent_layer_get_gradients_of_batches() -> None:
    model, data = Recurrent(), vectors()
    sizes = [4, 2]
    found = collect(prepared(model, data[0]), data, sizes, GradientCollector())
    expected = {"fc.weight": one_by_one(model, data)["fc.weight"]}
    for name in ("lstm.weight_ih_l0", "lstm.weight_hh_l0"):
        parameter = dict(model.named_parameters())[name]
        total = torch.zeros_like(parameter)
        for x, target in zip(data[0].split(sizes), data[1].split(sizes), strict=True):
            (gradient,) = torch.autograd.grad(losses(model(x), target).sum(), parameter)
            total += gradient.square()
        expected[name] = total / BATCH
    assert_close(found, expected)


class Positions(nn.Module):
    """A table of positions that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((x + self.table(torch.arange(5))).tanh()).mean(1)


def test_positions_that_all_samples_share_get_gradients_of_batches() -> None:
    model, data = Positions(), vectors()
    sizes = [4, 2]
    found = collect(prepared(model, data[0]), data, sizes, GradientCollector())
    total = torch.zeros(5, 4)
    for x, target in zip(data[0].split(sizes), data[1].split(sizes), strict=True):
        loss = losses(model(x), target).sum()
        (gradient,) = torch.autograd.grad(loss, model.table.weight)
        total += gradient.square()
    expected = {"fc.weight": one_by_one(model, data)["fc.weight"], "table.weight": total / BATCH}
    assert_close(found, expected)


def test_a_weight_that_the_loss_reads_in_another_way_counts_in_full() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w).mean(1) * self.w.square().sum()

    model, data = Scaled(), vectors()
    found = collect(prepared(model, data[0]), data, [1] * BATCH, GradientCollector())
    assert_close(found, one_by_one(model, data))


def test_taps_change_no_output_and_leave_the_original_alone() -> None:
    _, data, program = example("convolutions")
    before = str(program.graph_module.graph)
    gm = tapped(program, GradientCollector())
    assert torch.equal(gm(data[0]), program.graph_module(data[0]))
    assert str(program.graph_module.graph) == before
    assert str(gm.graph) != before


def test_without_gradients_nothing_is_recorded() -> None:
    _, data, program = example("convolutions")
    collector = GradientCollector(positions=True)
    gm = tapped(program, collector)
    with torch.no_grad():
        gm(data[0])
    assert collector.sums == {}
    assert collector.saliency == {}


def test_finishing_twice_is_finishing_once() -> None:
    _, data, program = example("sequences")
    collector = GradientCollector()
    first = {
        name: value.clone() for name, value in collect(program, data, [BATCH], collector).items()
    }
    assert_close(collector.finish(), first)
