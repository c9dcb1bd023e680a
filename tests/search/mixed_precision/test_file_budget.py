"""A budget in bytes is one of the saved file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.budget_table import BUDGETS, X, net, saved, table
from torch import nn

import graphopt
from graphopt.errors import GraphOptError, InfeasibleError, InputError
from graphopt.mixed_precision import Recipe, SensitivityTable, analyze
from graphopt.palettization import KMeansPalettizer
from graphopt.search.mixed_precision import file_budget
from graphopt.specs.artifact import read_bytes


@pytest.mark.integration
@pytest.mark.parametrize(
    "backend",
    [
        "torch",
        pytest.param("coreai", marks=pytest.mark.coreai),
        pytest.param("coreml", marks=[pytest.mark.coreml, pytest.mark.slow]),
        pytest.param("executorch", marks=[pytest.mark.executorch, pytest.mark.slow]),
    ],
)
def test_file_is_within_the_budget_and_near_it(backend: str, tmp_path: Path) -> None:
    known = table(backend)
    for number, budget in enumerate(BUDGETS[backend]):
        recipe = known.recipe(target_bytes=budget)
        folder = tmp_path / str(number)
        folder.mkdir()
        size = saved(recipe, backend, folder)
        assert 0.75 * read_bytes(budget) < size <= read_bytes(budget)
        assert recipe.file_bytes == pytest.approx(size, rel=0.002)


@pytest.mark.integration
@pytest.mark.coreai
def test_budget_that_tensors_alone_would_meet_is_met_by_the_file(tmp_path: Path) -> None:
    recipe = table("coreai").recipe(target_bytes=48 * 1024)
    size = saved(recipe, "coreai", tmp_path)
    assert 0.75 * 48 * 1024 < size <= 48 * 1024


@pytest.fixture(scope="module")
def neutral() -> SensitivityTable:
    return table("torch")


def test_budget_below_the_program_itself_is_refused_with_the_nearest(
    neutral: SensitivityTable, tmp_path: Path
) -> None:
    smallest = neutral.recipe(target_bpw=2.2).bytes
    with pytest.raises(InfeasibleError, match="the nearest budget that fits") as refused:
        neutral.recipe(target_bytes=smallest + 1000)
    found = re.search(r"takes ([\d,]+), the nearest", str(refused.value))
    assert found is not None
    nearest = int(found[1].replace(",", ""))
    assert nearest - 200 < saved(neutral.recipe(target_bytes=nearest), "torch", tmp_path) <= nearest


def test_file_that_misses_the_budget_is_refused_before_it_is_written(
    neutral: SensitivityTable, tmp_path: Path
) -> None:
    recipe = neutral.recipe(target_bytes="60 KB")
    assert recipe.artifact is not None
    assert recipe.artifact.max_bytes == 60_000
    program = graphopt.compress(net(), (X,), recipe.to_config())
    assert program.artifact == recipe.artifact
    small = replace(program, artifact=recipe.artifact.model_copy(update={"max_bytes": 40_000}))
    with pytest.raises(InfeasibleError, match=r"above the budget of 40,000; nothing was written"):
        small.save(tmp_path / "model.pt2")
    artifact = graphopt.lower(program, "torch", stack_traces=True)
    artifact.wanted = small.artifact
    with pytest.raises(InfeasibleError, match="'stack_traces': True"):
        artifact.save(tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_recipe_keeps_its_file_in_yaml_and_in_the_config(
    neutral: SensitivityTable, tmp_path: Path
) -> None:
    recipe = neutral.recipe(target_bytes=60_000, lowering={"stack_traces": False})
    loaded = Recipe.load(recipe.save(tmp_path / "recipe.yaml"))
    assert loaded.artifact == recipe.artifact
    wanted = loaded.artifact
    assert wanted is not None
    assert (wanted.backend, dict(wanted.lowering)) == ("torch", {"stack_traces": False})
    palettizer = KMeansPalettizer(net(), loaded.to_config())
    palettizer.prepare((X,))
    assert palettizer.program().artifact == wanted


def test_another_target_has_other_sizes_and_its_own_budget(neutral: SensitivityTable) -> None:
    narrow = neutral.recipe(target_bpw=6, backend="coreai", precision="float16")
    wide = neutral.recipe(target_bpw=6, backend="coreai")
    layer, other = narrow.layers[0], wide.layers[0]
    assert (layer.kept_bits, other.kept_bits) == (16 * 128 * 128, 32 * 128 * 128)
    assert narrow.artifact is not None
    assert dict(narrow.artifact.lowering) == {"precision": "float16"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "float16"}, "has no option"),
        ({"lowering": {"tables": "int8"}}, "has no option"),
        ({"backend": "coreai", "precision": "float8"}, "precision must be"),
        (
            {"backend": "coreai", "precision": "float16", "lowering": {"precision": "float32"}},
            "contradict",
        ),
        ({"backend": "coreai", "lowering": {"ignored_ops": print}}, "cannot be kept in a file"),
    ],
)
def test_options_that_a_target_does_not_have_are_refused(
    neutral: SensitivityTable, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(GraphOptError, match=words):
        neutral.recipe(target_bytes=60_000, **options)


def test_options_without_a_target_are_refused() -> None:
    with pytest.raises(InputError, match="give backend"):
        analyze(net(), (X,), [4], [X], precision="float16")


def test_budget_of_a_file_takes_the_model(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    analyze(net(), (X,), [2, 4, 6], [X], backend="torch", path=path)
    with pytest.raises(InputError, match="load the table with model="):
        SensitivityTable.load(path).recipe(target_bytes=60_000)


def test_budget_without_a_target_counts_tensors() -> None:
    recipe = analyze(net(), (X,), [2, 4, 6], [X]).recipe(target_bytes=60_000)
    assert recipe.artifact is None
    assert recipe.bytes <= 60_000


@pytest.mark.parametrize(
    ("module", "candidate", "bits"),
    [
        # tables of linear layers are expanded; kernels hold integers of linear layers, and of
        # convolutions between integers; others are codes of a table of all bytes
        ("linear", "4-bit", 32 * 64 * 64),
        ("linear", "int8", 8 * 64 * 64 + 64 * 32),
        ("convolution", "int8", 8 * 64 * 64 + 64 * 32 + 256 * 32),
        ("convolution", "int8 a8", 8 * 64 * 64 + 64 * 32),
        ("embedding", "4-bit", 4 * 64 * 64 + 32 * 16),
    ],
)
def test_weights_that_a_target_expands_are_priced_dense(
    module: str, candidate: str, bits: int
) -> None:
    torch.manual_seed(0)
    layers = {
        "linear": (nn.Linear(64, 64), torch.randn(2, 64)),
        "convolution": (nn.Conv2d(64, 64, 1), torch.randn(2, 64, 3, 3)),
        "embedding": (nn.Embedding(64, 64), torch.arange(6).reshape(2, 3)),
    }
    layer, x = layers[module]
    model = nn.Sequential(layer, nn.ReLU()).eval()
    names: Any = {candidate: candidate if candidate != "4-bit" else 4}
    known = analyze(model, (x,), names, [x], backend="executorch")
    (found,) = known.layers
    assert found.bits_of(candidate) == bits


@pytest.mark.parametrize("spare", [0, 10, 63, 64, 500])
def test_file_a_few_bytes_too_large_makes_room_for_the_next_smaller_recipe_not_for_the_smallest(
    neutral: SensitivityTable, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    monkeypatch.setattr(
        file_budget, "file_size", lambda table, recipe, lowering: recipe.bytes + 5000
    )
    wanted = neutral.recipe(target_bpw=4.2)
    smallest = neutral.recipe(target_bpw=2.2)
    target = wanted.bytes + 5000 + spare
    found = neutral.recipe(target_bytes=target)
    assert found.file_bytes is not None
    assert found.file_bytes <= target
    # one layer has one step less at most: 128 × 128 weights of 2 bits
    assert found.bytes >= wanted.bytes - 128 * 128 * 2 / 8 - 64
    assert found.bytes > smallest.bytes
