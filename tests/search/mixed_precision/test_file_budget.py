"""A budget in bytes is one of the saved file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import InfeasibleError
from graphopt.mixed_precision import SensitivityTable, analyze

SUFFIXES = {"torch": ".pt2", "coreai": ".aimodel", "coreml": ".mlpackage", "executorch": ".pte"}
X = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(128, 128), nn.ReLU())]
    return nn.Sequential(*layers).eval()


def table(backend: str) -> SensitivityTable:
    half = backend in ("coreai", "coreml")
    kind = torch.float16 if half else torch.float32
    # XNNPACK keeps tables dense
    integers = {"int8": {"quantize": {"dtype": "int8"}}}
    candidates: Any = integers if backend == "executorch" else [2, 4, 6]
    return analyze(net(), (X,), candidates, [X], backend=backend, float_dtype=kind)


def saved(recipe: graphopt.Recipe, backend: str, folder: Path) -> int:
    program = graphopt.compress(net(), (X,), recipe.to_config())
    options = {"precision": "float16"} if backend in ("coreai", "coreml") else {}
    artifact = graphopt.lower(program, backend, **options)
    artifact.save(folder / f"model{SUFFIXES[backend]}")
    return artifact.size


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
    asked = (9, 16, 24) if backend == "executorch" else (2.2, 4.2, 6.2)
    sizes = [known.recipe(target_bpw=bits).bytes for bits in asked]
    # what the file has beside its tensors is 3 to 15 KB
    for number, budget in enumerate(size + 20_000 for size in sizes):
        recipe = known.recipe(target_bytes=budget, keep=backend == "executorch")
        folder = tmp_path / str(number)
        folder.mkdir()
        size = saved(recipe, backend, folder)
        assert size <= budget
        assert recipe.file_bytes == pytest.approx(size, rel=0.02)


@pytest.mark.integration
@pytest.mark.coreai
def test_budget_that_tensors_alone_would_meet_is_met_by_the_file(tmp_path: Path) -> None:
    recipe = table("coreai").recipe(target_bytes=48 * 1024)
    size = saved(recipe, "coreai", tmp_path)
    assert 0.75 * 48 * 1024 < size <= 48 * 1024


def test_budget_below_the_program_itself_is_refused_with_the_nearest() -> None:
    known = table("torch")
    smallest = known.recipe(target_bpw=2.2).bytes
    with pytest.raises(InfeasibleError, match="the nearest that was tried has"):
        known.recipe(target_bytes=smallest + 1000)


def test_table_without_its_model_counts_tensors(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    analyze(net(), (X,), [2, 4, 6], [X], backend="torch", path=path)
    known = SensitivityTable.load(path)
    recipe = known.recipe(target_bytes=60_000)
    assert recipe.file_bytes is None
    assert recipe.bytes <= 60_000
