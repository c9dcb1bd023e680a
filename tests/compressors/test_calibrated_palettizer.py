"""Palettes weighed by data: calibration_mode, calibrate, sensitivities, and the algorithms of specs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import graphopt
from graphopt.errors import CalibrationError, InputError, StateError
from graphopt.numerics.kmeans1d import cluster_1d
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity
from graphopt.quantization import QuantizationSpec

pytestmark = pytest.mark.usefixtures("one_thread")


ALGORITHMS = ("auto", "kmeans", "skm", "gptq")
CALIBRATED = ("skm", "gptq")


def config(algorithm: str = "auto", n_bits: int = 2, **names: str) -> KMeansPalettizerConfig:
    """One spec everywhere; `names` are modules with another algorithm."""

    def module(kind: str) -> ModuleKMeansPalettizerConfig:
        spec = PalettizationSpec(n_bits=n_bits, algorithm=kind)
        return ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})

    return KMeansPalettizerConfig(
        global_config=module(algorithm),
        module_name_configs={name: module(kind) for name, kind in names.items()},
    )


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


WEIGHTS = ("first.weight", "second.weight", "head.weight")


def mlp() -> MLP:
    torch.manual_seed(0)
    return MLP().eval()


def inputs(count: int, seed: int = 1) -> Tensor:
    """Features of very different importance."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([3.0, 1.0, 1.0, 0.3, 0.1, 0.03])


DATA = [inputs(12), inputs(20, seed=2)]


@cache
def captured() -> graphopt.Program:
    """The MLP, captured once for all tests."""
    return graphopt.capture(mlp(), (DATA[0][:2],))


def prepared_for(
    model: nn.Module | graphopt.Program,
    setup: KMeansPalettizerConfig | None = None,
    args: Any = None,
    **options: Any,
) -> tuple[KMeansPalettizer, Any]:
    palettizer = KMeansPalettizer(model, setup or config())
    if args is None and isinstance(model, nn.Module):
        args = (DATA[0][:2],)
    return palettizer, palettizer.prepare(args, progress=False, **options)


def state(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


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


# --------------------------------------------------------------------------- the context
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_original_weights_compute_inside_and_palettes_outside(algorithm: str) -> None:
    model = mlp()
    palettizer, prepared = prepared_for(model, config(algorithm))
    names = list(prepared.state_dict())
    assert not torch.equal(prepared(DATA[0]), model(DATA[0]))
    with palettizer.calibration_mode(progress=False) as calibrator:
        for x in DATA:
            y = prepared(x)
            torch.testing.assert_close(y, model(x), rtol=0, atol=0)
            if algorithm != "kmeans":
                calibrator.step(y)
        with torch.no_grad():
            torch.testing.assert_close(prepared(DATA[0]), model(DATA[0]), rtol=0, atol=0)
        assert list(prepared.state_dict()) == names
    assert list(prepared.state_dict()) == names == list(model.state_dict())
    for name in WEIGHTS:
        assert prepared.state_dict()[name].unique().numel() <= 4, name
    torch.testing.assert_close(
        palettizer.program().graph_module(DATA[1]), prepared(DATA[1]), rtol=0, atol=1e-6
    )


def test_calibrating_changes_the_module_that_prepare_returned() -> None:
    palettizer, prepared = prepared_for(captured())
    before = state(prepared)
    assert palettizer.calibrate(DATA, progress=False) is prepared
    assert any(not torch.equal(prepared.state_dict()[name], before[name]) for name in WEIGHTS)
    assert palettizer.summary()["first.weight"].snr_db > 0


def test_auto_is_skm_after_a_calibration_and_kmeans_before() -> None:
    _, plain = prepared_for(captured(), config("kmeans"))
    (one, first), (two, second) = (
        prepared_for(captured(), config(each)) for each in ("auto", "skm")
    )
    for module in (first, second):
        assert_same(state(module), state(plain))
    one.calibrate(DATA, progress=False)
    two.calibrate(DATA, progress=False)
    assert_same(state(first), state(second))


@pytest.mark.parametrize("algorithm", CALIBRATED)
def test_the_callers_model_is_not_changed(algorithm: str) -> None:
    model = mlp()
    before = state(model)
    palettizer, _ = prepared_for(model, config(algorithm))
    palettizer.calibrate(DATA, progress=False)
    palettizer.program()
    assert_same(state(model), before)
    assert all(each.grad is None and each.requires_grad for each in model.parameters())


@pytest.mark.parametrize("algorithm", CALIBRATED)
@pytest.mark.parametrize("calibrated_before", [False, True])
def test_exception_inside_leaves_everything_as_before(
    algorithm: str, calibrated_before: bool
) -> None:
    palettizer, prepared = prepared_for(captured(), config(algorithm))
    if calibrated_before:
        palettizer.calibrate(DATA, progress=False)
    before, code, table = state(prepared), prepared.code, palettizer.summary()
    trained = {name: each.requires_grad for name, each in prepared.named_parameters()}
    output = prepared(DATA[1])

    def interrupted() -> None:
        with palettizer.calibration_mode(progress=False) as calibrator:
            calibrator.step(prepared(DATA[0] + 1))
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        interrupted()
    assert_same(state(prepared), before)
    assert prepared.code == code
    assert palettizer.summary() == table
    assert {name: each.requires_grad for name, each in prepared.named_parameters()} == trained
    torch.testing.assert_close(prepared(DATA[1]), output, rtol=0, atol=0)
    torch.testing.assert_close(
        palettizer.program().graph_module(DATA[1]), output, rtol=0, atol=1e-6
    )


def test_requires_grad_flags_of_the_user_come_back() -> None:
    palettizer, prepared = prepared_for(captured(), config("gptq"))
    prepared.first.weight.requires_grad_(False)
    prepared.head.bias.requires_grad_(False)
    parameters = dict(prepared.named_parameters())
    palettizer.calibrate(DATA, progress=False)
    after = dict(prepared.named_parameters())
    assert {name for name, each in after.items() if not each.requires_grad} == {
        "first.weight",
        "head.bias",
    }
    assert all(after[name] is each for name, each in parameters.items())
    assert all(each.grad is None for each in after.values())


@pytest.mark.parametrize("algorithm", CALIBRATED)
def test_context_without_data_is_refused_and_changes_nothing(algorithm: str) -> None:
    palettizer, prepared = prepared_for(captured(), config(algorithm))
    before = state(prepared)
    with pytest.raises(CalibrationError, match="no data"), palettizer.calibration_mode():
        pass
    with pytest.raises(CalibrationError, match="no data"):
        palettizer.calibrate([], progress=False)
    assert_same(state(prepared), before)


def test_prepare_comes_first() -> None:
    palettizer = KMeansPalettizer(mlp())
    with pytest.raises(StateError, match="prepare"), palettizer.calibration_mode():
        pass
    with pytest.raises(StateError, match="prepare"):
        palettizer.calibrate(DATA)


def test_loss_that_does_not_come_from_the_module_is_refused() -> None:
    palettizer, prepared = prepared_for(captured())
    before = state(prepared)
    with (
        pytest.raises(InputError, match="no gradient"),
        palettizer.calibration_mode(progress=False) as calibrator,
        torch.no_grad(),
    ):
        calibrator.step(prepared(DATA[0]))
    assert_same(state(prepared), before)


# --------------------------------------------------------------------------- sensitivities
class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, groups=3)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.conv(x).relu()).relu()
        return self.fc(self.up(y).tanh().mean((2, 3)))


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


def losses(kind: str) -> Callable[[Any, Any], Tensor]:
    return lambda y, target: F.cross_entropy(y, target, reduction=kind)


@pytest.mark.parametrize(
    ("name", "reduction"), [("linear", "none"), *((name, "mean") for name in CASES)]
)
def test_sensitivities_are_mean_squared_gradients_of_single_samples(
    name: str, reduction: str, tmp_path: Path
) -> None:
    make, x, size = CASES[name]
    model = make().eval()
    palettizer, prepared = prepared_for(model, args=(x[:size],))
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
    palettizer, prepared = prepared_for(model)
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
    palettizer, _ = prepared_for(model, args=(x.repeat(2, 1),))
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
    palettizer, prepared = prepared_for(Branches().eval())
    before = state(prepared)
    assert palettizer.summary().warnings == ()
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


# --------------------------------------------------------------------------- fitting outputs
class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, 2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, 2, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def trained(kind: str) -> tuple[nn.Module, Tensor]:
    """A net trained on digits, and the inputs."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    torch.manual_seed(0)
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(digits.target)
    if kind == "mlp":
        x = x.flatten(1)
        model: nn.Module = nn.Sequential(
            nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
        )
    else:
        model = Digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        chosen = torch.randint(0, 1200, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model.eval(), x


@pytest.mark.parametrize("kind", ["convolution", "mlp"])
def test_fitted_outputs_have_less_error_than_kmeans_at_the_same_size(kind: str) -> None:
    model, x = trained(kind)
    errors, sizes = {}, {}
    for algorithm in ("kmeans", "gptq"):
        palettizer, prepared = prepared_for(model, config(algorithm), (x[:2],))
        if algorithm == "gptq":
            palettizer.calibrate([x[:128], x[128:256]], progress=False)
        with torch.no_grad():
            errors[algorithm] = float((prepared(x[1200:]) - model(x[1200:])).square().mean())
        sizes[algorithm] = sum(row.stored_bits for row in palettizer.summary().palettized)
    assert sizes["gptq"] == sizes["kmeans"]
    assert errors["gptq"] < 0.6 * errors["kmeans"], errors


def test_biases_take_up_the_mean_error_on_request() -> None:
    model = mlp()
    found = {}
    for correct in (False, True):
        palettizer, prepared = prepared_for(model, config("gptq"))
        palettizer.calibrate(DATA, progress=False, correct_bias=correct)
        found[correct] = state(prepared)
    for name, value in model.state_dict().items():
        if name.endswith("bias"):
            assert torch.equal(found[False][name], value), name
            assert not torch.equal(found[True][name], value), name


@pytest.mark.parametrize("algorithm", CALIBRATED)
def test_calibrating_twice_is_calibrating_once(algorithm: str) -> None:
    (one, first), (two, second) = (prepared_for(captured(), config(algorithm)) for _ in range(2))
    one.calibrate(DATA, progress=False)
    two.calibrate([3 * x + 1 for x in DATA], progress=False)
    two.calibrate(DATA, progress=False)
    assert_same(state(first), state(second))
    assert one.summary() == two.summary()
    assert_same(state(one.program().graph_module), state(two.program().graph_module))


def test_biases_of_an_earlier_calibration_do_not_stay() -> None:
    (one, first), (two, second) = (prepared_for(captured(), config("gptq")) for _ in range(2))
    one.calibrate(DATA, progress=False, correct_bias=False)
    two.calibrate(DATA, progress=False)
    two.calibrate(DATA, progress=False, correct_bias=False)
    torch.testing.assert_close(
        two.program().graph_module(DATA[0]), second(DATA[0]), rtol=0, atol=1e-6
    )
    assert_same(state(second), state(first))


@pytest.mark.parametrize(
    "spec",
    [
        PalettizationSpec(n_bits=2, algorithm="gptq", cluster_dim=2),
        PalettizationSpec(n_bits=2, algorithm="gptq", enable_per_channel_scale=True),
        PalettizationSpec(
            n_bits=2, algorithm="gptq", granularity=PerGroupedChannelGranularity(group_size=8)
        ),
        PalettizationSpec(
            n_bits=2,
            algorithm="gptq",
            granularity=PerGroupedChannelGranularity(axis=1, group_size=2),
        ),
    ],
    ids=["vectors", "scales", "groups of rows", "groups of columns"],
)
def test_every_layout_is_fitted_and_stored_as_prepared(spec: PalettizationSpec) -> None:
    setup = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec}),
        module_name_configs={"head": None},
    )
    model = mlp()
    palettizer, prepared = prepared_for(model, setup)
    x = torch.cat(DATA)
    before = (prepared(x) - model(x)).square().mean()
    palettizer.calibrate(DATA, progress=False)
    assert palettizer.summary().warnings == ()
    assert (prepared(x) - model(x)).square().mean() < before
    finalized = palettizer.finalize(backend="torch")
    torch.testing.assert_close(finalized(x), prepared(x), rtol=0, atol=1e-6)


@pytest.mark.coreai
@pytest.mark.parametrize("kind", ["convolution", "mlp"])
def test_fitted_program_runs_in_core_ai(kind: str, tmp_path: Path) -> None:
    model, x = trained(kind)
    palettizer, prepared = prepared_for(model, config("gptq"), (x[:1],))
    palettizer.calibrate([x[:64]], progress=False)
    artifact = graphopt.lower(palettizer.program(), "coreai", precision="float32")
    artifact.save(tmp_path / "net.aimodel")
    assert artifact.verify().max_error < 1e-4
    finalized = palettizer.finalize(backend="coreai")
    torch.testing.assert_close(finalized(x[300:303]), prepared(x[300:303]), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------- files and repetition
def test_saved_sensitivities_give_the_palettes_of_their_calibration(tmp_path: Path) -> None:
    path = tmp_path / "made" / "s.safetensors"
    palettizer, prepared = prepared_for(captured())
    with palettizer.calibration_mode(
        loss_fn=losses("mean"), sensitivity_path=path, progress=False
    ) as calibrator:
        calibrator.step(prepared(DATA[0]), torch.arange(12) % 4)
    again, other = prepared_for(captured(), sensitivity_path=path)
    assert_same(state(other), state(prepared))
    assert again.summary().palettized == palettizer.summary().palettized


def test_saved_sensitivities_do_not_weigh_kmeans_weights(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    palettizer, _ = prepared_for(captured())
    palettizer.calibrate(DATA, progress=False, sensitivity_path=path)
    _, plain = prepared_for(captured(), config("kmeans"))
    _, found = prepared_for(captured(), config("kmeans"), sensitivity_path=path)
    assert_same(state(found), state(plain))


def test_sensitivities_asked_for_but_not_needed_do_not_lose_the_calibration(
    tmp_path: Path,
) -> None:
    (one, first), (two, second) = (prepared_for(captured(), config("gptq")) for _ in range(2))
    one.calibrate(DATA, progress=False)
    two.calibrate(DATA, progress=False, sensitivity_path=tmp_path / "s.safetensors")
    assert_same(state(first), state(second))


def test_sensitivities_of_another_model_are_refused(tmp_path: Path) -> None:
    palettizer, _ = prepared_for(captured())
    with pytest.raises(StateError, match="calibration_mode"):
        palettizer.save_sensitivities(tmp_path / "s.safetensors")
    palettizer.calibrate(DATA, progress=False, sensitivity_path=tmp_path / "s.safetensors")
    other = nn.Sequential(nn.Linear(6, 4)).eval()
    with pytest.raises(InputError, match="no sensitivity for any weight"):
        prepared_for(other, sensitivity_path=tmp_path / "s.safetensors")
    with pytest.raises(InputError, match="missing"):
        prepared_for(captured(), sensitivity_path=tmp_path / "missing.safetensors")


@pytest.mark.parametrize("algorithm", CALIBRATED)
def test_sums_in_mapped_files_give_the_same(algorithm: str, tmp_path: Path) -> None:
    (one, first), (two, second) = (prepared_for(captured(), config(algorithm)) for _ in range(2))
    one.calibrate(DATA, progress=False)
    for _ in range(2):
        two.calibrate(DATA, progress=False, mmap_dir=tmp_path / "sums")
        assert_same(state(first), state(second))
    if algorithm != "gptq":
        sizes = {each.name: each.stat().st_size for each in (tmp_path / "sums").iterdir()}
        model = mlp()
        assert sizes == {f"{n}.f32": 4 * model.state_dict()[n].numel() for n in WEIGHTS}


@pytest.mark.parametrize("algorithm", CALIBRATED)
def test_same_seed_gives_the_same_on_any_number_of_threads(algorithm: str) -> None:
    torch.manual_seed(0)
    model, x = Conv().eval(), torch.randn(8, 2, 8, 8)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            palettizer, prepared = prepared_for(model, config(algorithm), (x[:2],))
            palettizer.calibrate([x[:5], x[5:]], progress=False)
            found.append(state(prepared))
    finally:
        torch.set_num_threads(threads)
    assert_same(found[1], found[0])


@pytest.mark.parametrize("algorithm", CALIBRATED)
def test_half_precision_models_are_calibrated_in_their_type(algorithm: str) -> None:
    model, data = mlp().half(), [x.half() for x in DATA]
    palettizer, prepared = prepared_for(model, config(algorithm, n_bits=3), (data[0][:2],))
    before = state(prepared)
    palettizer.calibrate(data, progress=False)
    found = state(prepared)
    assert all(value.dtype is torch.float16 for value in found.values())
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert any(not torch.equal(found[name], before[name]) for name in WEIGHTS)
    finalized = palettizer.finalize(backend="torch")
    assert finalized(data[0]).dtype is torch.float16
    torch.testing.assert_close(finalized(data[0]), prepared(data[0]), rtol=0, atol=1e-3)
    # the same palettes as the model in single precision, up to rounding
    palettizer, wide = prepared_for(model.float(), config(algorithm, n_bits=3))
    palettizer.calibrate([x.float() for x in data], progress=False)
    x = torch.cat(data)
    torch.testing.assert_close(prepared(x).float(), wide(x.float()), rtol=0.1, atol=0.1)


class Sum(nn.Module):
    """Two branches that see the same inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def test_a_layer_makes_up_for_what_the_other_side_of_its_sum_lost() -> None:
    torch.manual_seed(0)
    model = Sum().eval()
    x = torch.randn(256, 8)

    def section(n_bits: int) -> ModuleKMeansPalettizerConfig:
        spec = PalettizationSpec(n_bits=n_bits, algorithm="gptq")
        return ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})

    setup = KMeansPalettizerConfig(
        global_config=section(8), module_name_configs={"first": section(1)}
    )
    palettizer, prepared = prepared_for(model, setup, (x[:2],))
    palettizer.calibrate([x])
    with torch.no_grad():
        alone = F.linear(x, prepared.first.weight - model.first.weight)  # type: ignore[union-attr]
        error = prepared(x) - model(x)
    # with a ridge of 0.3 an isotropic input keeps (0.3 / 1.3)² of the error
    assert float(error.var()) < 0.1 * float(alone.var())


class Reader(nn.Module):
    """Words and places, of which a narrow head reads a few directions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(200, 32), nn.Embedding(12, 32)
        self.head = nn.Linear(32, 4, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids) + self.places(torch.arange(ids.shape[1])))


def test_errors_of_embeddings_go_where_nothing_reads_them() -> None:
    torch.manual_seed(0)
    model = Reader().eval()
    chance = 1 / torch.arange(1, 201).float()
    seen, unseen = (
        torch.multinomial(chance, 64 * 12, replacement=True).reshape(64, 12) for _ in range(2)
    )
    errors = {}
    for algorithm in ("kmeans", "gptq"):
        setup = KMeansPalettizerConfig(
            global_config=None,
            module_name_configs={
                name: ModuleKMeansPalettizerConfig(
                    op_state_spec={"weight": PalettizationSpec(n_bits=2, algorithm=algorithm)}
                )
                for name in ("words", "places")
            },
        )
        palettizer, prepared = prepared_for(model, setup, (seen[:2],))
        palettizer.calibrate([seen[:32], seen[32:]])
        with torch.no_grad():
            errors[algorithm] = float((prepared(unseen) - model(unseen)).square().mean())
    assert errors["gptq"] < 0.4 * errors["kmeans"], errors


FORMS: dict[str, dict[str, Any]] = {
    "vectors": {"cluster_dim": 2},
    "int8 tables": {"lut_qspec": QuantizationSpec()},
    "channel scales": {"enable_per_channel_scale": True},
    "groups": {"granularity": PerGroupedChannelGranularity(group_size=4)},
}


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("coreai", marks=pytest.mark.coreai),
        pytest.param("coreml", marks=pytest.mark.coreml),
    ],
)
@pytest.mark.parametrize("algorithm", CALIBRATED)
@pytest.mark.parametrize("form", FORMS)
def test_calibrated_palettes_of_every_form_are_what_the_target_computes(
    form: str, algorithm: str, target: str, tmp_path: Path
) -> None:
    spec = PalettizationSpec(n_bits=2, algorithm=algorithm, **FORMS[form])
    setup = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )
    palettizer, prepared = prepared_for(captured(), setup)
    palettizer.calibrate(DATA)
    program = palettizer.program()
    x = DATA[0][:2]
    torch.testing.assert_close(program.module()(x), prepared(x), rtol=1e-5, atol=1e-6)
    artifact = graphopt.lower(program, target, precision="float32")
    artifact.save(tmp_path / f"net{artifact.suffix}")
    outcome = artifact.verify(x)
    assert outcome.complete
    assert outcome.weights == 3
    assert outcome.max_error < 1e-5
