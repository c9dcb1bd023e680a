"""The commands as a user runs them, on files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from search.mixed_precision.nets import pictures, residual
from typer.testing import CliRunner

from graphopt.cli.main import app
from graphopt.cli.mixed_precision import read_data
from graphopt.errors import ArtifactExistsError, InfeasibleError, InputError
from graphopt.mixed_precision import Recipe, SensitivityTable, analyze

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    x = torch.cat(pictures())
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(residual(), (x[:4],), dynamic_shapes=({0: batch},))
    torch.export.save(exported, folder / "model.pt2")
    torch.save(x, folder / "data.pt")
    return folder


def call(*words: object) -> Any:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.integration
def test_analyze_recipe_sweep_and_compress_follow_each_other(files: Path, tmp_path: Path) -> None:
    table, recipe = tmp_path / "table.jsonl", tmp_path / "recipe.yaml"
    model, data = files / "model.pt2", files / "data.pt"
    done = call(
        "analyze",
        model,
        "--data",
        data,
        "-o",
        table,
        "--candidates",
        "2,4,6",
        "--mode",
        "hybrid",
        "--batch-size",
        8,
        "--plot",
        tmp_path / "table.png",
        "--csv",
        tmp_path / "table.csv",
    )
    assert "conv2.weight" in done.output
    x = pictures()
    own = analyze(residual(), (x[0],), [2, 4, 6], x)
    for layer, values in SensitivityTable.load(table).values().items():
        assert values == pytest.approx(own.values()[layer], abs=1e-3)
    call("recipe", table, "--bpw", 4, "-o", recipe, "--pin", "head.*=6-bit")
    assert Recipe.load(recipe).choice["head.weight"] == "6-bit"
    refined = tmp_path / "refined.yaml"
    call(
        "recipe",
        table,
        "--bpw",
        4,
        "-o",
        refined,
        "--refine",
        model,
        "--data",
        data,
        "--batch-size",
        8,
    )
    assert Recipe.load(refined).measured is not None
    done = call(
        "sweep",
        table,
        model,
        "--data",
        data,
        "-o",
        tmp_path / "sweep.jsonl",
        "--from",
        3,
        "--to",
        5,
        "--points",
        3,
        "--plot",
        tmp_path / "sweep.png",
        "--json",
    )
    points = json.loads(done.output)["points"]
    assert [point["kind"] for point in points] == ["recipe"] * 3 + ["uniform"] * 3 + [
        "uncompressed"
    ]
    scores = [point["score"] for point in points[:3]]
    assert scores == sorted(scores)
    done = call("compress", model, "--config", recipe, "-o", tmp_path / "model.pt2", "--json")
    rows = {row["name"]: row["n_bits"] for row in json.loads(done.output)["tensors"]}
    assert rows["head.weight"] == 6
    for picture in ("table.png", "sweep.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ArtifactExistsError):
        call("recipe", table, "--bpw", 4, "-o", recipe)
    with pytest.raises(InfeasibleError, match="are attainable"):
        call("recipe", table, "--bpw", 1, "-o", tmp_path / "none.yaml")
    assert not (tmp_path / "none.yaml").exists()


@pytest.mark.integration
def test_bytes_are_those_of_the_file(files: Path, tmp_path: Path) -> None:
    x, model, data = pictures(), files / "model.pt2", tmp_path / "table.jsonl"
    analyze(model, None, [2, 4, 6], x[:1], path=data)
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out.pt2"
    with pytest.raises(InputError, match="load the table with model="):
        call("recipe", data, "--bytes", "30KB", "--backend", "torch", "-o", recipe)
    words = ("recipe", data, "--backend", "torch", "--model", model, "-o", recipe)
    with pytest.raises(InfeasibleError, match="the nearest budget that fits"):
        call(*words, "--bytes", "1KiB")
    call(*words, "--bytes", "40KB")
    wanted = Recipe.load(recipe).artifact
    assert wanted is not None
    assert (wanted.backend, wanted.max_bytes) == ("torch", 40_000)
    call("compress", model, "--config", recipe, "-o", out)
    assert out.stat().st_size <= 40_000


@pytest.mark.integration
def test_analyze_resumes_and_restarts(files: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    words = (
        "analyze",
        files / "model.pt2",
        "--data",
        files / "data.pt",
        "-o",
        table,
        "--batch-size",
        8,
        "--json",
    )
    call(*words, "--candidates", "4")
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:-3]) + "\n")
    call(*words, "--candidates", "4", "--resume")
    assert sorted(table.read_text().splitlines()) == sorted(lines)
    with pytest.raises(InputError, match="other settings"):
        call(*words, "--candidates", "2")
    call(*words, "--candidates", "2", "--restart")
    assert SensitivityTable.load(table).layers[0].candidates == ("2-bit",)


def test_data_come_in_several_files(tmp_path: Path) -> None:
    x = torch.randn(5, 3)
    np.save(tmp_path / "a.npy", x.numpy())
    np.savez(tmp_path / "b.npz", x=x.numpy(), y=x[:, 0].numpy())
    torch.save([(x, x), {"x": x}], tmp_path / "c.pt")
    assert [len(each) for each in read_data(tmp_path / "a.npy", 2)] == [2, 2, 1]
    calls = read_data(tmp_path / "b.npz", 3)
    assert [set(each) for each in calls] == [{"x", "y"}] * 2
    torch.testing.assert_close(torch.cat([each["y"] for each in calls]), x[:, 0])
    assert len(read_data(tmp_path / "c.pt", 2)) == 2
    (tmp_path / "d.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        read_data(tmp_path / "d.pt", 2)
