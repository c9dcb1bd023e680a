"""Files of sensitivities."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from graphopt.errors import InputError
from graphopt.fitting.sensitivity import (
    load_sensitivities,
    save_sensitivities,
)

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
