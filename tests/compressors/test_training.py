"""Palettes that train: differentiable k-means, straight-through, schedules, and what comes out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import CompressionError, InputError, StateError
from graphopt.numerics import soft_palette as soft
from graphopt.palettization import (
    DKMPalettizer,
    DKMPalettizerConfig,
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleDKMPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.config import PATSchedule
from graphopt.prepared import WeightPalettizer
from graphopt.specs import (
    DKMTrainingSpec,
    PerGroupedChannelGranularity,
    QuantizationSpec,
    STETrainingSpec,
)
from graphopt.specs.palettization import Bits


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(F.relu(self.norm(self.conv(x))).mean((2, 3))))


def example() -> tuple[Tensor]:
    return (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)),)


def config(spec: PalettizationSpec, schedule: PATSchedule | None = None) -> DKMPalettizerConfig:
    section = ModuleDKMPalettizerConfig(op_state_spec={"weight": spec}, pat_schedule=schedule)
    return DKMPalettizerConfig(global_config=section)


def codes_of(prepared: nn.Module) -> list[Tensor]:
    found = [each for each in prepared.modules() if isinstance(each, WeightPalettizer)]
    weights = dict(prepared.named_parameters())
    return [each.palettized(weights[each.origin.name]).indices for each in found]


def plain_dkm(w: Tensor, table: Tensor, tau: Tensor, steps: int) -> Tensor:
    """The article's equations, in the precision of the arguments."""
    for _ in range(steps):
        attention = torch.softmax(-torch.cdist(w, table).square() / tau[:, None, None], 2)
        table = attention.mT @ w / attention.sum(1)[..., None]
    attention = torch.softmax(-torch.cdist(w, table).square() / tau[:, None, None], 2)
    return attention @ table


@pytest.mark.parametrize("length", [1, 2, 4])
def test_soft_palette_and_its_gradient_are_those_of_the_equations(length: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(3, 200, length, dtype=torch.float64)
    table = torch.randn(3, 8, length, dtype=torch.float64).sort(dim=1).values
    tau = torch.tensor([0.05, 0.2, 1.0], dtype=torch.float64)
    direction = torch.randn_like(w)
    found = w.clone().requires_grad_()
    mixed, _ = soft.soft_palette(found, table, tau, 3)
    mixed.backward(direction)
    wanted = w.clone().requires_grad_()
    exact = plain_dkm(wanted, table, tau, 3)
    exact.backward(direction)
    assert wanted.grad is not None
    torch.testing.assert_close(mixed, exact, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-7, atol=1e-9)


def test_distinct_values_stand_for_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # 16-bit weights with a largest one of 1: every class has one value
    w = (torch.randint(-1024, 1025, (1, 20_000, 1)) / 1024).contiguous()
    w[0, 0, 0] = 1.0
    table = torch.linspace(-0.9, 0.9, 8).reshape(1, 8, 1)
    direction = torch.randn_like(w)

    def run(many: int) -> tuple[Tensor, Tensor]:
        monkeypatch.setattr(soft, "_MANY", many)
        leaf = w.clone().requires_grad_()
        mixed, _ = soft.soft_palette(leaf, table, torch.tensor([0.02]), 2)
        mixed.backward(direction)
        assert leaf.grad is not None
        return mixed.detach(), leaf.grad

    short, long = run(10), run(10**9)
    torch.testing.assert_close(short[0], long[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(short[1], long[1], rtol=1e-3, atol=1e-3)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    w = torch.randn(5, 300, 2, dtype=torch.float64)
    table = torch.randn(5, 16, 2, dtype=torch.float64)
    tau = torch.full((5,), 0.3, dtype=torch.float64)

    def run(chunk: int) -> tuple[Tensor, Tensor]:
        monkeypatch.setattr(soft, "_CHUNK", chunk)
        leaf = w.clone().requires_grad_()
        mixed, _ = soft.soft_palette(leaf, table, tau, 2)
        mixed.square().sum().backward()
        assert leaf.grad is not None
        return mixed.detach(), leaf.grad

    for whole, parts in zip(run(1 << 21), run(999), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-11)


SPECS = {
    "per tensor": PalettizationSpec(n_bits=2),
    "grouped": PalettizationSpec(
        n_bits=2, granularity=PerGroupedChannelGranularity(axis=0, group_size=4)
    ),
    "vectors": PalettizationSpec(n_bits=4, cluster_dim=2),
    "int8 table": PalettizationSpec(n_bits=2, lut_qspec=QuantizationSpec(dtype=torch.int8)),
    "channel scale": PalettizationSpec(n_bits=2, enable_per_channel_scale=True),
    "straight-through": PalettizationSpec(n_bits=2, training_strategy_spec=STETrainingSpec()),
}


def trained(spec: PalettizationSpec, schedule: PATSchedule | None = None) -> DKMPalettizer:
    torch.manual_seed(0)
    palettizer = DKMPalettizer(Net().eval(), config(spec, schedule))
    prepared = palettizer.prepare(example())
    optimizer = torch.optim.Adam(prepared.parameters(), lr=1e-2)
    x, y = torch.randn(64, 1, 8, 8), torch.randint(0, 4, (64,))
    with palettizer.training_mode():
        for _ in range(12):
            optimizer.zero_grad()
            F.cross_entropy(prepared(x), y).backward()
            optimizer.step()
            palettizer.step()
    return palettizer


@pytest.mark.parametrize("name", SPECS)
def test_evaluation_computes_what_the_program_holds(name: str) -> None:
    palettizer = trained(SPECS[name])
    program = palettizer.program()
    assert palettizer._prepared is not None
    prepared = palettizer._prepared
    torch.testing.assert_close(
        program.module()(*example()), prepared(*example()), rtol=1e-5, atol=1e-6
    )
    # one table's worth of distinct values each, and weights have moved from the start
    assert all(
        row.status == "palettized" for row in program.report() if row.name.endswith("weight")
    )


@pytest.mark.integration
@pytest.mark.coreai
@pytest.mark.parametrize("name", ["int8 table", "channel scale"])
def test_trained_palettes_run_on_the_target(name: str, tmp_path: object) -> None:
    artifact = graphopt.lower(trained(SPECS[name]).program(), "coreai")
    artifact.save(f"{tmp_path}/m.aimodel")
    assert artifact.verification.max_error < 1e-5


@pytest.mark.parametrize(
    ("strategy", "n_bits", "rate"),
    [(DKMTrainingSpec(), 1, 5e-3), (STETrainingSpec(), 2, 3e-3)],
    ids=["dkm", "ste"],
)
def test_training_lowers_the_loss_of_the_palettized_model(
    strategy: DKMTrainingSpec | STETrainingSpec, n_bits: Bits, rate: float
) -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    x = torch.randn(512, 16)
    with torch.no_grad():
        y = teacher(x)
    spec = PalettizationSpec(n_bits=n_bits, training_strategy_spec=strategy)
    palettizer = DKMPalettizer(teacher.eval(), config(spec))
    prepared = palettizer.prepare((x,))
    before = F.mse_loss(prepared(x), y)
    optimizer = torch.optim.Adam(prepared.parameters(), lr=rate)
    with palettizer.training_mode():
        for _ in range(60):
            optimizer.zero_grad()
            F.mse_loss(prepared(x), y).backward()
            optimizer.step()
            palettizer.step()
    after = F.mse_loss(palettizer.program().module()(x), y)
    assert after < 0.85 * before


def test_every_parameter_gets_a_gradient_and_norms_and_dropout_train() -> None:
    palettizer = DKMPalettizer(Net().eval(), config(PalettizationSpec(n_bits=2)))
    prepared = palettizer.prepare(example())
    running = prepared.state_dict()["norm.running_mean"].clone()
    x = torch.randn(8, 1, 8, 8)
    with palettizer.training_mode():
        assert not torch.equal(prepared(x), prepared(x))  # dropout
        prepared(x).square().sum().backward()
    assert all(each.grad is not None for each in prepared.parameters())
    assert not torch.equal(prepared.state_dict()["norm.running_mean"], running)
    assert torch.equal(prepared(x), prepared(x))


def test_names_are_those_of_the_model_and_the_model_stays() -> None:
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    palettizer = DKMPalettizer(model, config(PalettizationSpec(n_bits=2)))
    prepared = palettizer.prepare(example())
    assert {name for name, _ in prepared.named_parameters()} == dict(
        model.named_parameters()
    ).keys()
    trained_copy = dict(prepared.named_parameters())["out.weight"]
    with torch.no_grad():
        trained_copy.add_(1.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_schedule_warms_up_and_freezes_codes() -> None:
    torch.manual_seed(0)
    schedule = PATSchedule(enable_fake_palettize=2, freeze_codes=4)
    model = Net().eval()
    palettizer = DKMPalettizer(model, config(PalettizationSpec(n_bits=2), schedule))
    prepared = palettizer.prepare(example())
    optimizer = torch.optim.Adam(prepared.parameters(), lr=3e-2)
    x = torch.randn(16, 1, 8, 8)
    seen = []
    with palettizer.training_mode():
        for _ in range(8):
            optimizer.zero_grad()
            prepared(x).square().sum().backward()
            optimizer.step()
            palettizer.step()
            seen.append([each.clone() for each in codes_of(prepared)])
        on = [m for m in prepared.modules() if isinstance(m, WeightPalettizer)]
        assert all(each.palettizing and each.frozen for each in on)
    frozen = seen[4:]
    assert all(
        torch.equal(a, b) for later in frozen[1:] for a, b in zip(frozen[0], later, strict=True)
    )
    assert any(not torch.equal(a, b) for a, b in zip(seen[1], seen[3], strict=True))


def test_before_the_schedule_begins_weights_are_as_they_are() -> None:
    model = Net().eval()
    schedule = PATSchedule(enable_fake_palettize=5)
    palettizer = DKMPalettizer(model, config(PalettizationSpec(n_bits=1), schedule))
    prepared = palettizer.prepare(example())
    with palettizer.training_mode():
        prepared.eval()
        torch.testing.assert_close(prepared(*example()), model(*example()), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(prepared(*example()), model(*example()), atol=1e-3)


def test_k_means_palettizer_trains_straight_through() -> None:
    torch.manual_seed(0)
    section = ModuleKMeansPalettizerConfig(op_state_spec={"weight": PalettizationSpec(n_bits=2)})
    palettizer = KMeansPalettizer(Net().eval(), KMeansPalettizerConfig(global_config=section))
    prepared = palettizer.prepare(example())
    parameters = list(prepared.parameters())
    before = prepared(*example())
    with palettizer.training_mode() as same:
        assert same is prepared
        assert all(a is b for a, b in zip(parameters, prepared.parameters(), strict=True))
        prepared(torch.randn(8, 1, 8, 8)).square().sum().backward()
        assert all(each.grad is not None for each in parameters)
        strategies = {m.strategy for m in prepared.modules() if isinstance(m, WeightPalettizer)}
        assert strategies == {None}
    assert before.shape == prepared(*example()).shape
    with torch.no_grad():
        for each in parameters:
            each.add_(0.01 * torch.randn_like(each))
    torch.testing.assert_close(
        palettizer.program().module()(*example()), prepared(*example()), rtol=1e-5, atol=1e-6
    )


def test_a_trained_copy_can_be_finalized() -> None:
    palettizer = DKMPalettizer(Net().eval(), config(PalettizationSpec(n_bits=2)))
    prepared = palettizer.prepare(example())
    other = copy.deepcopy(prepared)
    with torch.no_grad():
        dict(other.named_parameters())["out.bias"].add_(1.0)
    torch.testing.assert_close(
        palettizer.finalize(other, backend="torch")(*example()),
        other(*example()),
        rtol=1e-5,
        atol=1e-6,
    )
    with pytest.raises(InputError, match="must come from prepare"):
        palettizer.finalize(nn.Linear(2, 2), backend="torch")


def test_training_needs_prepare() -> None:
    palettizer = DKMPalettizer(Net())
    with pytest.raises(StateError, match="prepare"):
        palettizer.step()
    with pytest.raises(StateError, match="prepare"), palettizer.training_mode():
        pass


def test_training_is_the_same_for_the_same_seed() -> None:
    first, second = (trained(PalettizationSpec(n_bits=2)).program() for _ in range(2))
    for a, b in zip(first.graph_module.buffers(), second.graph_module.buffers(), strict=True):
        assert torch.equal(a, b)


def test_sparse_outliers_are_refused_in_training_by_name() -> None:
    palettizer = DKMPalettizer(Net(), config(PalettizationSpec(outlier_fraction=0.05)))
    with pytest.raises(CompressionError, match=r"conv\.weight.*outlier_fraction=0"):
        palettizer.prepare(example())
