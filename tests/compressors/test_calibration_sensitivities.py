"""Sensitivities of a calibration, against gradients of single samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.calibrated_palettes import (
    CALIBRATED,
    DATA,
    MLP,
    WEIGHTS,
    Conv,
    assert_same,
    captured,
    config,
    inputs,
    losses,
    mlp,
    prepared_for,
    state,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from graphopt.errors import InputError
from graphopt.numerics.kmeans1d import cluster_1d

pytestmark = pytest.mark.usefixtures("one_thread")


def sensitivities_by_hand(
    model: nn.Module, samples: Sequence[tuple[Any, ...]], loss: Callable[[Any, int], Tensor]
) -> dict[str, Tensor]:
    """Mean over samples of the squared gradient, one sample of batch 1 at a time."""
    model = copy.deepcopy(model)
    sums = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    for number, args in enumerate(samples):
        model.zero_grad()
        loss(model(*args), number).backward()
        for name, each in model.named_parameters():
            if each.grad is not None:
                sums[name] += each.grad.square()
    return {name: value / len(samples) for name, value in sums.items()}


# --------------------------------------------------------------------------- sensitivities
class Tokens(nn.Module):
    """Repeated ids, layers over tokens, a plain matrix product, a recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.fc = nn.Linear(6, 8)
        self.right = nn.Parameter(torch.randn(8, 5))
        self.lstm = nn.LSTM(5, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.fc(self.embed(ids)).tanh() @ self.right
        return self.head(self.lstm(y)[0].mean(1))


TARGETS = torch.tensor([0, 2, 1, 1, 0, 2])


CASES: dict[str, tuple[type[nn.Module], Tensor, int]] = {  # …, batch size
    "linear": (MLP, inputs(6), 4),
    "convolution": (Conv, torch.randn(6, 2, 6, 6), 4),
    "tokens one by one": (Tokens, torch.randint(0, 7, (6, 5)), 1),
}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "reduction"), [("linear", "none"), *((name, "mean") for name in CASES)]
)
def test_sensitivities_are_mean_squared_gradients_of_single_samples(
    name: str, reduction: str, tmp_path: Path
) -> None:
    make, x, size = CASES[name]
    model = make().eval()
    palettizer, prepared = prepared_for(model, config("skm"), (x[:size],))
    with palettizer.calibration_mode(loss_fn=losses(reduction), progress=False) as calibrator:
        for start in range(0, len(x), size):
            calibrator.step(prepared(x[start : start + size]), TARGETS[start : start + size])
    found = load_file(palettizer.save_sensitivities(tmp_path / "s.safetensors"))
    wanted = sensitivities_by_hand(
        model,
        [(each[None],) for each in x],
        lambda y, number: F.cross_entropy(y, TARGETS[number : number + 1]),
    )
    assert set(found) == {row.name for row in palettizer.summary().palettized}
    for key, value in found.items():
        scale = float(wanted[key].max())
        torch.testing.assert_close(
            value, wanted[key], rtol=1e-3, atol=1e-5 * scale, msg=lambda text, key=key: key + text
        )


@pytest.mark.parametrize("n_bits", [1, 3])
def test_tables_are_the_best_for_the_sensitivities_with_a_floor(n_bits: int) -> None:
    model = mlp()
    palettizer, prepared = prepared_for(model, config("skm", n_bits))
    x = torch.cat(DATA)
    targets = torch.arange(len(x)) % 4
    loss = losses("mean")
    with palettizer.calibration_mode(loss_fn=loss, progress=False) as calibrator:
        for part in (slice(0, 12), slice(12, None)):
            calibrator.step(prepared(x[part]), targets[part])
    importance = sensitivities_by_hand(
        model, [(each[None],) for each in x], lambda y, i: loss(y, targets[i : i + 1])
    )
    for name in WEIGHTS:
        weight, mass = model.state_dict()[name].reshape(1, -1), importance[name].reshape(1, -1)
        mass = mass + 1e-3 * mass.mean()
        best = cluster_1d(weight, [2**n_bits], weights=mass, method="exact")[2**n_bits].dense()
        torch.testing.assert_close(
            prepared.state_dict()[name].reshape(1, -1), best, rtol=1e-4, atol=1e-5
        )
        plain = cluster_1d(weight, [2**n_bits], method="exact")[2**n_bits].dense()
        assert not torch.allclose(best, plain, rtol=1e-3, atol=1e-3)


def test_product_of_means_stands_in_for_single_samples_on_request(tmp_path: Path) -> None:
    model = mlp()
    palettizer, prepared = prepared_for(model, config("skm"))
    x, targets = torch.cat(DATA), torch.arange(32) % 4
    options = {"loss_fn": losses("mean"), "per_sample": False}
    with palettizer.calibration_mode(progress=False, **options) as calibrator:
        calibrator.step(prepared(x[:12]), targets[:12])
        calibrator.step(prepared(x[12:]), targets[12:])
    found = load_file(palettizer.save_sensitivities(tmp_path / "s.safetensors"))
    hidden = model.first(x).relu()
    y = model.second(hidden)
    y.retain_grad()
    F.cross_entropy(model.head(y.relu()), targets, reduction="sum").backward()
    wanted = y.grad.square().mean(0)[:, None] * hidden.detach().square().mean(0)[None]
    torch.testing.assert_close(found["second.weight"], wanted, rtol=1e-4, atol=1e-8)


def test_label_free_squares_estimate_the_curvature_of_the_output_error(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)).eval()
    x = torch.randn(1, 5)
    palettizer, _ = prepared_for(model, config("skm"), (x.repeat(2, 1),))
    palettizer.calibrate([x.repeat(8192, 1)], progress=False)
    found = load_file(palettizer.save_sensitivities(tmp_path / "s.safetensors"))
    wanted = torch.zeros_like(found["0.weight"])
    for column in model(x)[0]:
        (gradient,) = torch.autograd.grad(column, model[0].weight, retain_graph=True)
        wanted += gradient.square()
    torch.testing.assert_close(found["0.weight"], wanted, rtol=0.1, atol=1e-6)


@pytest.mark.parametrize("label_free", ["mse", "kl"])
@pytest.mark.parametrize("algorithm", CALIBRATED)
def test_running_the_module_without_labels_is_enough(algorithm: str, label_free: str) -> None:
    (one, first), (two, second) = (prepared_for(captured(), config(algorithm)) for _ in range(2))
    before = state(first)
    one.calibrate(DATA, progress=False, label_free=label_free)
    with two.calibration_mode(progress=False, label_free=label_free), torch.no_grad():
        for x in DATA:
            second(x)
    assert_same(state(first), state(second))
    assert any(not torch.equal(first.state_dict()[name], before[name]) for name in WEIGHTS)


def test_unknown_label_free_loss_is_refused() -> None:
    palettizer, _ = prepared_for(captured())
    with pytest.raises(InputError, match="'mse' or 'kl'"):
        palettizer.calibrate(DATA, progress=False, label_free="mae")


@pytest.mark.parametrize("algorithm", CALIBRATED)
@pytest.mark.parametrize("form", ["tuple", "list", "keywords"])
def test_data_come_in_any_form_of_one_call(form: str, algorithm: str) -> None:
    wrap = {"tuple": lambda x: (x,), "list": lambda x: [x], "keywords": lambda x: {"x": x}}[form]
    (one, first), (two, second) = (prepared_for(captured(), config(algorithm)) for _ in range(2))
    one.calibrate(DATA, progress=False)
    two.calibrate(iter([wrap(x) for x in DATA]), progress=False)
    assert_same(state(first), state(second))


# --------------------------------------------------------------------------- what is weighed
def test_kmeans_weights_stay_as_prepare_made_them() -> None:
    setup = config("auto", second="kmeans", head="gptq")
    palettizer, prepared = prepared_for(captured(), setup)
    before, row = state(prepared), palettizer.summary()["second.weight"]
    palettizer.calibrate(DATA, progress=False)
    assert torch.equal(prepared.state_dict()["second.weight"], before["second.weight"])
    assert palettizer.summary()["second.weight"] == row
    for name in ("first.weight", "head.weight"):
        assert not torch.equal(prepared.state_dict()[name], before[name]), name


def test_calibrating_where_nothing_is_weighed_changes_nothing() -> None:
    palettizer, prepared = prepared_for(captured(), config("kmeans"))
    before, table = state(prepared), palettizer.summary()
    palettizer.calibrate(DATA, progress=False)
    assert_same(state(prepared), before)
    assert palettizer.summary() == table


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.silent, self.ignored = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.used(x) + 0 * self.silent(x), self.ignored(x)


def test_weights_without_a_gradient_are_named_and_clustered_plainly() -> None:
    palettizer, prepared = prepared_for(Branches().eval(), config("skm"))
    before = state(prepared)
    with palettizer.calibration_mode(
        loss_fn=lambda y, _: y[0].square().sum(1).mean(), progress=False
    ) as calibrator:
        calibrator.step(prepared(DATA[0]))
    warnings = palettizer.summary().warnings
    assert sorted(text.split(":")[0] for text in warnings) == ["ignored.weight", "silent.weight"]
    assert all("no gradient" in text for text in warnings)
    for name in ("ignored.weight", "silent.weight"):
        assert torch.equal(prepared.state_dict()[name], before[name]), name
    assert not torch.equal(prepared.state_dict()["used.weight"], before["used.weight"])


class Masked(nn.Module):
    """One attention layer whose padded positions reach no output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.mlp, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        e = self.embed(ids)
        scores = self.query(e) @ self.key(e).transpose(1, 2)
        scores = scores.masked_fill(mask[:, None] == 0, -1e9)
        e = e + scores.softmax(-1) @ self.value(e)
        e = e + self.mlp(e).relu()
        kept = mask.to(e.dtype)[:, :, None]
        return self.head((e * kept).sum(1) / kept.sum(1))


@pytest.mark.parametrize("algorithm", CALIBRATED)
def test_garbage_in_padded_positions_does_not_change_the_palettes(algorithm: str) -> None:
    model = Masked().eval()
    ids, mask = torch.randint(0, 15, (8, 6)), torch.ones(8, 6, dtype=torch.int64)
    mask[::2, 3:] = 0
    mask[1::2, 5:] = 0
    garbage = torch.where(mask == 0, torch.randint(15, 30, ids.shape), ids)
    assert torch.equal(model(ids, mask), model(garbage, mask))
    unmasked = torch.ones_like(mask)
    found = []
    palettizer, prepared = prepared_for(model, config(algorithm), (ids[:2], mask[:2]))
    for tokens, kept in ((ids, mask), (garbage, mask), (garbage, unmasked)):
        palettizer.calibrate([(tokens[:4], kept[:4]), (tokens[4:], kept[4:])], progress=False)
        found.append(state(prepared))
    assert_same(found[1], found[0])
    assert not torch.equal(found[2]["mlp.weight"], found[0]["mlp.weight"])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(12, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.fc(self.embed(ids)).tanh())


@pytest.mark.parametrize("algorithm", CALIBRATED)
def test_tied_weight_is_palettized_once(algorithm: str) -> None:
    ids = torch.randint(0, 12, (6, 4))
    palettizer, prepared = prepared_for(Tied().eval(), config(algorithm), (ids[:2],))
    with palettizer.calibration_mode(progress=False) as calibrator:
        calibrator.step(prepared(ids))
    table = palettizer.summary()
    assert len(table.palettized) == 2
    found = prepared.state_dict()
    assert torch.equal(found["embed.weight"], found["head.weight"])
    assert found["embed.weight"].unique().numel() <= 4
    finalized = palettizer.finalize(backend="torch")
    assert sum("lut" in name for name in finalized.state_dict()) == 2
    torch.testing.assert_close(finalized(ids), prepared(ids), rtol=0, atol=1e-6)


def test_tied_weight_adds_up_the_squares_of_each_use(tmp_path: Path) -> None:
    model, ids = Tied().eval(), torch.randint(0, 12, (6, 4))
    palettizer, prepared = prepared_for(model, args=(ids[:2],))

    def loss(y: Tensor, target: Any) -> Tensor:
        return y.square().sum((1, 2))

    with palettizer.calibration_mode(loss_fn=loss, progress=False) as calibrator:
        calibrator.step(prepared(ids))
    found = load_file(palettizer.save_sensitivities(tmp_path / "s.safetensors"))
    wanted = torch.zeros_like(model.embed.weight)
    for each in ids:
        rows = model.embed(each[None]).detach().requires_grad_()
        weight = model.embed.weight.detach().clone().requires_grad_()
        output = F.linear(model.fc(rows).tanh(), weight)
        to_rows, to_weight = torch.autograd.grad(loss(output, 0).sum(), (rows, weight))
        looked_up = torch.zeros_like(weight).index_add(0, each, to_rows[0])
        wanted += (looked_up.square() + to_weight.square()) / len(ids)
    (name,) = set(found) - {"fc.weight"}
    torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-6)
