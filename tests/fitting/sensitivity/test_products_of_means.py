"""Sensitivities without single samples, and the facade over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.sensitivity_models import (
    BATCH,
    Data,
    assert_close,
    collect,
    example,
    losses,
    one_by_one,
    prepared,
)
from torch import Tensor, nn

from graphopt.fitting.sensitivity import (
    GradientCollector,
    load_sensitivities,
)
from graphopt.palettization import KMeansPalettizer


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


@pytest.mark.integration
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


@pytest.mark.integration
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
