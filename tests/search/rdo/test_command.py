"""graphopt rdo as a user runs it, on files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from search.rdo.nets import calibration, held_out, trained
from typer.testing import CliRunner

from graphopt.cli.main import app, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rdo")
    batch = torch.export.Dim("batch", min=2)
    x = torch.cat(calibration(128))
    exported = torch.export.export(trained(), (x[:4],), dynamic_shapes=({0: batch},))
    torch.export.save(exported, folder / "model.pt2")
    torch.save(x, folder / "data.pt")
    torch.save(held_out()[0], folder / "held.pt")
    (folder / "rdo.yaml").write_text(
        "target_bits: 5.5\ncandidates: [4, 8]\ndraws: 1\nrounding: {steps: 5}\n"
    )
    return folder


def call(*words: object) -> Any:
    pytest.importorskip("matplotlib")
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.integration
def test_config_and_options_give_a_folder(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call(
        "rdo",
        files / "model.pt2",
        "--data",
        files / "data.pt",
        "-o",
        out,
        "--config",
        files / "rdo.yaml",
        "--evaluation",
        files / "held.pt",
        "--target-bits",
        5,
    )
    assert "rate-distortion" in done.output
    report = json.loads((out / "report.json").read_text())
    assert report["bits_per_weight"] <= 5
    assert report["config"]["candidates"] == [4, 8]
    assert report["samples"] == 128
    assert torch.export.load(out / "quantized.pt2").module()(held_out()[0]).shape == (300, 10)


def test_json_is_the_report(files: Path, tmp_path: Path) -> None:
    done = call(
        "rdo",
        files / "model.pt2",
        "--data",
        files / "data.pt",
        "-o",
        tmp_path / "out",
        "-c",
        files / "rdo.yaml",
        "--candidates",
        "2,4,int8",
        "--family",
        "palette",
        "--seed",
        3,
        "--json",
    )
    printed = json.loads(done.output)
    assert printed["config"]["family"] == "palette"
    assert printed["config"]["seed"] == 3
    assert {"2-bit", "4-bit", "int8"} >= {layer["candidate"] for layer in printed["layers"]}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 4, "give --target-bits"),
        (("--target-bits", "1"), 10, "attainable are"),
        (("--target-bits", "5", "--candidates", "4,nine"), 4, "not understood"),
    ],
)
def test_refusals_have_their_exit_codes(
    words: tuple[str, ...],
    code: int,
    message: str,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = [
        "graphopt",
        "rdo",
        str(files / "model.pt2"),
        "--data",
        str(files / "data.pt"),
        "-o",
        str(tmp_path / "out"),
        *words,
    ]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == code
    assert not list(tmp_path.iterdir())  # a run that never began leaves nothing to go on from
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
