"""Mean squared gradients per sample against a loop of autograd over single samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import graphopt
from graphopt.analysis.weights import find_weights
from graphopt.errors import InputError
from graphopt.fitting.sensitivity import (
    GradientCollector,
    label_free_loss,
    load_sensitivities,
    save_sensitivities,
)
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.program import Program
from graphopt.palettization import KMeansPalettizer
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


def images() -> Data:
    return torch.randn(BATCH, 3, 8, 8), torch.randint(0, 3, (BATCH,))


def tokens(classes: int = 3) -> Data:
    ids = torch.randint(0, 7, (BATCH, 5))
    ids[:, 3] = ids[:, 1]  # every sample repeats a token
    return ids, torch.randint(0, classes, (BATCH,))


def vectors() -> Data:
    return torch.randn(BATCH, 5, 4), torch.randint(0, 3, (BATCH,))


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


class Flat(nn.Module):
    """As GPT-2 of transformers does it: an op sees all tokens of all samples as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.fc(x.reshape(-1, 4)).tanh()
        return rows.reshape(x.shape[0], -1, 3).mean(1)


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


# ---------------------------------------------------------------------------- factored
def activations(model: nn.Module, layer: nn.Module, data: Data) -> tuple[Tensor, Tensor]:
    """Input of a layer and gradient of the summed loss at its output."""
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.extend([args[0].detach(), output])
        output.retain_grad()
        return output

    handle = layer.register_forward_hook(watch)
    losses(model(data[0]), data[1]).sum().backward()
    handle.remove()
    x, y = seen
    assert y.grad is not None
    return x, y.grad


def test_without_samples_a_linear_layer_takes_the_product_of_two_means() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    data = torch.randn(BATCH, 4), torch.randint(0, 3, (BATCH,))
    found = collect(prepared(model, data[0]), data, [4, 2], GradientCollector(per_sample=False))
    expected = {}
    for place in (0, 2):
        x, gradient = activations(model, model[place], data)
        expected[f"{place}.weight"] = torch.outer(gradient.square().mean(0), x.square().mean(0))
    assert_close(found, expected)


def test_without_samples_a_convolution_sums_both_over_its_positions() -> None:
    model, data, program = example("convolutions")
    found = collect(program, data, [4, 2], GradientCollector(per_sample=False))
    x, gradient = activations(model, model.grouped, data)
    halves = []
    for inputs, outputs in zip(x.chunk(2, 1), gradient.chunk(2, 1), strict=True):
        columns = F.unfold(inputs, (1, 3), dilation=2, padding=(0, 2))  # batch, 4·3, positions
        rows = outputs.flatten(2).square().sum((0, 2)) / BATCH
        halves.append(torch.outer(rows, columns.square().sum((0, 2)) / BATCH))
    assert_close(
        {"grouped.weight": found["grouped.weight"]},
        {"grouped.weight": torch.cat(halves).reshape(6, 4, 1, 3)},
    )


def test_saliency_is_the_squared_gradient_of_each_position_against_its_sample() -> None:
    model, data, program = example("convolutions")
    collector = GradientCollector(squares=False, positions=True)
    assert collect(program, data, [4, 2], collector) == {}
    _, gradient = activations(model, model.depthwise, data)
    power = gradient.flatten(2).square().mean(1)
    (found,) = [value for name, value in collector.saliency.items() if name == "conv2d_1"]
    assert [len(value) for value in found] == [4, 2]
    torch.testing.assert_close(
        torch.cat(found), power / power.mean(1, keepdim=True), rtol=1e-3, atol=1e-5
    )


# ---------------------------------------------------------------------------- through the facade
def facade(
    model: nn.Module, data: Data, sizes: Sequence[int], path: Path, **options: object
) -> dict[str, Tensor]:
    palettizer = KMeansPalettizer(model)
    module = palettizer.prepare((data[0],), progress=False)
    with palettizer.calibration_mode(sensitivity_path=path, progress=False, **options) as steps:
        for x, target in zip(data[0].split(list(sizes)), data[1].split(list(sizes)), strict=True):
            steps.step(module(x), target)
    shapes = {name: value.shape for name, value in model.named_parameters() if value.ndim > 1}
    return load_sensitivities(path, shapes)


def test_a_mean_loss_and_one_per_sample_give_the_same_numbers(tmp_path: Path) -> None:
    model, data, _ = example("sequences")
    single = facade(model, data, [4, 2], tmp_path / "single", loss_fn=losses)
    mean = facade(model, data, [4, 2], tmp_path / "mean", loss_fn=lambda y, t: losses(y, t).mean())
    assert_close(mean, single)
    assert_close(single, one_by_one(model, data))


def test_files_that_hold_the_sums_change_nothing(tmp_path: Path) -> None:
    model, data, program = example("sequences")
    folder = tmp_path / "sums" / "here"
    mapped = collect(program, data, [4, 2], GradientCollector(folder=folder))
    assert_close(mapped, one_by_one(model, data))
    kept = collect(program, data, [4, 2], GradientCollector())
    for name, value in kept.items():
        assert torch.equal(mapped[name], value)
        stored = torch.from_file(
            str(folder / f"{name}.f32"), shared=False, size=value.numel(), dtype=torch.float32
        )
        assert torch.equal(stored.reshape(value.shape), value)
    assert len(list(folder.iterdir())) == len(kept)


def test_a_folder_that_holds_older_sums_starts_from_zero(tmp_path: Path) -> None:
    _, data, program = example("sequences")
    first = {
        name: value.clone()
        for name, value in collect(
            program, data, [BATCH], GradientCollector(folder=tmp_path)
        ).items()
    }
    again = collect(program, data, [BATCH], GradientCollector(folder=tmp_path))
    assert all(torch.equal(again[name], value) for name, value in first.items())


# ---------------------------------------------------------------------------- label-free loss
class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def gauss_newton(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Σ over outputs of their squared gradients."""
    found = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for output in model(x).flatten():
        gradients = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
        for name, gradient in zip(found, gradients, strict=True):
            found[name] += gradient.square()
    return found


def fisher(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Σ over classes of p · the squared gradient of log p."""
    found = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    scores = model(x).log_softmax(-1).flatten()
    for score in scores:
        gradients = torch.autograd.grad(score, list(model.parameters()), retain_graph=True)
        for name, gradient in zip(found, gradients, strict=True):
            found[name] += score.detach().exp() * gradient.square()
    return found


CURVATURES = {"mse": gauss_newton, "kl": fisher}


@pytest.mark.parametrize("kind", CURVATURES)
def test_squared_gradients_of_many_draws_are_the_curvature(kind: str) -> None:
    model, x = TwoLayers().eval(), torch.randn(1, 3)
    expected = CURVATURES[kind](model, x)
    draws = 20_000
    collector = GradientCollector()
    gm = tapped(prepared(model, torch.randn(2, 3)), collector)
    output = gm(x.expand(draws, -1))
    label_free_loss(output, torch.Generator().manual_seed(0), kind).backward()
    collector.samples = draws
    found = collector.finish()
    for name in ("first.weight", "second.weight"):
        largest = float(expected[name].max())
        torch.testing.assert_close(found[name], expected[name], rtol=0.08, atol=0.01 * largest)
    other = CURVATURES["kl" if kind == "mse" else "mse"](model, x)["first.weight"]
    assert float((found["first.weight"] / other).log().abs().min()) > 0.3


def test_logits_of_a_sequence_are_drawn_position_by_position() -> None:
    logits = torch.randn(1, 2, 3).expand(30_000, -1, -1).requires_grad_()
    # rows of onehot − p: their mean is zero, their covariance that of a categorical draw
    (drawn,) = torch.autograd.grad(
        label_free_loss(logits, torch.Generator().manual_seed(0), "kl"), logits
    )
    p = logits[0].detach().softmax(-1)
    torch.testing.assert_close(drawn.mean(0), torch.zeros(2, 3), rtol=0, atol=0.015)
    for place in range(2):
        covariance = drawn[:, place].T @ drawn[:, place] / len(drawn)
        expected = torch.diag(p[place]) - torch.outer(p[place], p[place])
        torch.testing.assert_close(covariance, expected, rtol=0, atol=0.015)
    across = drawn[:, 0].T @ drawn[:, 1] / len(drawn)
    torch.testing.assert_close(across, torch.zeros(3, 3), rtol=0, atol=0.015)


def test_every_floating_output_takes_part() -> None:
    parts = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    output = {"a": (parts[0], torch.tensor([1, 2])), "b": parts[1]}
    generator = torch.Generator().manual_seed(3)
    loss = label_free_loss(output, generator)
    again = torch.Generator().manual_seed(3)
    drawn = [torch.randn(2, 3, generator=again) for _ in range(2)]
    assert float(loss.detach()) == pytest.approx(
        float(sum((u * y.detach()).sum() for u, y in zip(drawn, parts, strict=True))), rel=1e-5
    )
    found = torch.autograd.grad(loss, parts)
    assert all(torch.equal(one, other) for one, other in zip(found, drawn, strict=True))


def test_the_loss_is_in_the_type_of_the_output() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        y = torch.randn(2, 3, dtype=dtype, requires_grad=True)
        for kind in CURVATURES:
            assert label_free_loss(y, torch.Generator(), kind).dtype is dtype


@pytest.mark.parametrize(
    ("output", "kind", "message"),
    [
        (torch.zeros(2, 3), "mae", "'mse' or 'kl'"),
        (torch.tensor([1, 2]), "mse", "no floating-point tensor"),
        ({}, "mse", "no floating-point tensor"),
    ],
)
def test_losses_that_cannot_be_taken_are_refused(output: object, kind: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        label_free_loss(output, torch.Generator(), kind)


# ---------------------------------------------------------------------------- on disk
SHAPES = {"a.weight": torch.Size([2, 3]), "b.weight": torch.Size([4])}


def sample() -> dict[str, Tensor]:
    return {name: torch.rand(shape) for name, shape in SHAPES.items()}


def test_sensitivities_survive_a_file(tmp_path: Path) -> None:
    given = {**sample(), "a.weight": torch.rand(3, 2).T}
    path = save_sensitivities(tmp_path / "new" / "folder" / "s.safetensors", given)
    found = load_sensitivities(path, SHAPES)
    assert set(found) == set(given)
    assert all(torch.equal(found[name], value) for name, value in given.items())
    assert [each.name for each in path.parent.iterdir()] == ["s.safetensors"]


def test_other_precisions_become_float32(tmp_path: Path) -> None:
    given = {name: value.double() for name, value in sample().items()}
    path = save_sensitivities(tmp_path / "s", given)
    found = load_sensitivities(path, SHAPES)
    assert all(torch.equal(found[name], value.float()) for name, value in given.items())
    save_file({name: value.half() for name, value in given.items()}, path)
    half = load_sensitivities(path, SHAPES)
    assert all(torch.equal(half[name], value.half().float()) for name, value in given.items())


def test_saving_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    save_sensitivities(path, sample())
    second = sample()
    save_sensitivities(path, second)
    assert torch.equal(load_sensitivities(path, SHAPES)["b.weight"], second["b.weight"])


def test_a_file_may_hold_more_or_less_than_the_model_asks_for(tmp_path: Path) -> None:
    path = save_sensitivities(tmp_path / "s", sample())
    more = {**SHAPES, "c.weight": torch.Size([5])}
    assert set(load_sensitivities(path, more)) == set(SHAPES)
    assert set(load_sensitivities(path, {"b.weight": SHAPES["b.weight"]})) == {"b.weight"}
    assert load_sensitivities(path, {}) == {}


WRONG = {
    "shape": ({"a.weight": torch.rand(3, 2)}, r"\(3, 2\), the weight \(2, 3\)"),
    "negative": ({"a.weight": torch.tensor([[1.0, -1e-9, 0.0]] * 2)}, "negative or not finite"),
    "NaN": ({"a.weight": torch.full((2, 3), torch.nan)}, "negative or not finite"),
    "Inf": ({"b.weight": torch.full((4,), torch.inf)}, "negative or not finite"),
    "of another model": ({"z": torch.rand(4)}, "no sensitivity for any weight"),
    "empty": ({}, "no sensitivity for any weight"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    given, message = WRONG[name]
    path = save_sensitivities(tmp_path / "s", given)
    with pytest.raises(InputError, match=message):
        load_sensitivities(path, SHAPES)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    text, pickled = tmp_path / "text", tmp_path / "pickled"
    text.write_text("no tensors here")
    torch.save(sample(), pickled)
    for path in (text, pickled, tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match="no safetensors file"):
            load_sensitivities(path, SHAPES)
