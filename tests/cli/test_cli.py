from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.shell import command
from torch import nn

import graphopt

CONFIG = """
kmeans_palettization_config:
  global_config:
    op_state_spec:
      weight: {n_bits: 4}
  module_name_configs:
    "2": null
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    torch.export.save(torch.export.export(model, (torch.randn(2, 16),)), tmp_path / "m.pt2")
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path


@pytest.mark.integration
def test_compress_writes_verifies_and_reports(folder: Path) -> None:
    words = ("compress", "m.pt2", "--config", "c.yaml", "-o", "o.pt2", "--json")
    done = command(folder, *words, "--max-error", "1e-6")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (folder / "o.pt2").stat().st_size == report["bytes"]
    assert {t["name"]: t["status"] for t in report["tensors"]} == {
        "0.weight": "palettized",
        "2.weight": "skipped",
    }
    assert report["verification"]["max_error"] == 0.0
    table = command(folder, "inspect", "o.pt2", "--json")
    modules = {m["name"]: m for m in json.loads(table.stdout)["modules"]}
    assert modules["0"]["bits_per_weight"] == pytest.approx(4 + 16 * 32 / 512)
    assert modules["2"]["bits_per_weight"] is None
    checked = command(folder, "verify", "o.pt2", "--reference", "o.pt2", "--json")
    assert json.loads(checked.stdout)["complete"] is True
    lossy = command(folder, "verify", "o.pt2", "--reference", "m.pt2", "--max-error", "1e-6")
    assert lossy.returncode == 8


def test_tables_are_for_people(folder: Path) -> None:
    done = command(folder, "compress", "m.pt2", "--config", "c.yaml", "-o", "o.pt2")
    assert done.returncode == 0
    assert "1 of 2 tensors palettized" in done.stdout
    assert re.search(r"\d bytes of 1 compressed tensor, [\d.]+ bits per weight", done.stdout)
    assert "bytes of other tensors and the program" in done.stdout
    (folder / "none.yaml").write_text("palettization: {global_config: null}")
    none = command(folder, "compress", "m.pt2", "--config", "none.yaml", "-o", "none.pt2")
    assert "no tensor is compressed" in none.stdout
    tree = command(folder, "inspect", "m.pt2").stdout
    assert "torch.nn.modules.linear.Linear" in tree
    assert "linear_1" in tree


@pytest.mark.parametrize(
    ("config", "output", "code", "message"),
    [
        (CONFIG.replace("n_bits", "nbits"), "o.pt2", 4, "op_state_spec.weight.nbits: unknown key"),
        (CONFIG.replace('"2"', '"head"'), "o.pt2", 4, "matches nothing"),
        (CONFIG, "o.tflite", 6, "cannot tell the target"),
        (CONFIG, "c.yaml.pt2", 7, "exists"),
    ],
)
def test_mistakes_have_exit_codes_and_write_nothing(
    folder: Path, config: str, output: str, code: int, message: str
) -> None:
    (folder / "c.yaml").write_text(config)
    (folder / "c.yaml.pt2").write_text("mine")
    before = sorted(path.name for path in folder.iterdir())
    done = command(folder, "compress", "m.pt2", "--config", "c.yaml", "-o", output)
    assert done.returncode == code, done.stderr
    assert message in " ".join(done.stderr.split())
    assert sorted(path.name for path in folder.iterdir()) == before
    assert (folder / "c.yaml.pt2").read_text() == "mine"


@pytest.mark.integration
def test_file_that_is_no_program_has_its_exit_code(folder: Path) -> None:
    (folder / "broken.pt2").write_bytes(b"nothing")
    # in a process of its own, as the entry point is called
    done = subprocess.run(
        [sys.executable, "-m", "graphopt.cli.main", "inspect", "broken.pt2"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "CaptureError" in done.stderr


# --- pipes ------------------------------------------------------------------------------------------------
JOINT = """
quantization_config:
  global_config: {}
"""


@pytest.fixture
def with_data(folder: Path) -> Path:
    (folder / "q.yaml").write_text(JOINT)
    torch.save(torch.randn(8, 16), folder / "d.pt")
    return folder


@pytest.mark.integration
def test_stages_compose_through_standard_streams(with_data: Path) -> None:
    source = (with_data / "m.pt2").read_bytes()
    first = command(with_data, "compress", "-", "--config", "c.yaml", "-o", "-", stdin=source)
    assert first.returncode == 0, first.stderr
    assert "1 of 2 tensors palettized" in first.stderr
    words = ("compress", "-", "--config", "q.yaml", "--data", "d.pt", "--batch-size", "2")
    words += ("-o", "-", "--json")
    second = command(with_data, *words, stdin=first.output)
    assert second.returncode == 0, second.stderr
    report = json.loads(second.stderr)
    assert {t["name"] for t in report["tensors"] if t["status"] == "quantized"} == {"2.weight"}
    assert report["verification"]["max_error"] == 0.0
    last = command(with_data, "lower", "-", "-o", "o.pt2", "--json", stdin=second.output)
    assert json.loads(last.stdout)["verification"]["max_error"] == 0.0
    module = torch.export.load(with_data / "o.pt2").module()
    targets = {str(node.target) for node in module.graph.nodes}
    assert "graphopt.lut_to_dense.default" in targets
    assert "quantized_decomposed.quantize_per_tensor.default" in targets
    seen = command(with_data, "inspect", "-", "--json", "--graph", "g.json", stdin=second.output)
    assert json.loads(seen.stdout)["palettized"] == 1
    assert (with_data / "g.json").exists()


@pytest.mark.integration
def test_entry_points_of_a_file_are_lowered_together(folder: Path) -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    x = (torch.randn(2, 16),)
    entries = {"whole": (net, x), "first": (net[0], x)}
    graphopt.lower(entries, "torch").save(folder / "set.pt2", overwrite=True)
    done = command(folder, "lower", "set.pt2", "-o", "set.pte", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verification"]["max_error"] < 1e-5
    assert (folder / "set.pte").stat().st_size < 4 * 16 * 16 * 2 + 8_000
    refused = command(folder, "compress", "set.pt2", "-o", "small.pt2")
    assert refused.returncode == 3
    assert "several entry points (whole, first)" in " ".join(refused.stderr.split())


def test_only_pt2_goes_to_standard_output(folder: Path) -> None:
    done = command(
        folder, "compress", "m.pt2", "--config", "c.yaml", "-o", "-", "--backend", "coreai"
    )
    assert done.returncode == 6
    assert "only .pt2 goes to standard output" in done.stderr


def test_passes_are_dumped_verified_and_reported(folder: Path) -> None:
    words = ("compress", "m.pt2", "--config", "c.yaml", "-o", "o.pt2", "--json")
    done = command(folder, *words, "--dump-passes", "dump", "--verify-passes", "--report", "r.json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert json.loads((folder / "r.json").read_text()) == report
    passes = {record["name"]: record for record in report["passes"]}
    assert passes["palettize-weights"]["error"] <= passes["palettize-weights"]["tolerance"]
    assert list((folder / "dump").glob("*-palettize-weights/changes.diff"))


def test_missing_data_are_named(with_data: Path) -> None:
    done = command(with_data, "compress", "m.pt2", "--config", "q.yaml", "-o", "o.pt2")
    assert done.returncode == 5
    assert "was never observed" in done.stderr
    assert not (with_data / "o.pt2").exists()


@pytest.mark.integration
def test_differences_and_pages_are_written(with_data: Path) -> None:
    command(with_data, "compress", "m.pt2", "--config", "c.yaml", "-o", "o.pt2")
    words = ("diff", "m.pt2", "o.pt2", "--data", "d.pt", "--json")
    layers = json.loads(command(with_data, *words).stdout)["layers"]
    assert [layer["dtype"] for layer in layers] == ["float32 → 4-bit table", "float32"]
    assert layers[1]["weight_sqnr"] is None
    assert 10 < layers[1]["output_sqnr"] < 40
    page = ("report", "o.pt2", "--before", "m.pt2", "--data", "d.pt", "-o", "page.html")
    done = command(with_data, *page)
    assert done.returncode == 0, done.stderr
    assert "0.weight" in (with_data / "page.html").read_text()
    assert command(with_data, *page).returncode == 7


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("diff", "m.pt2", "o.pt2", "--data", "wide.pt"), 3, "do not fit the captured graph"),
        (("diff", "m.pt2", "o.pt2", "--data", "d.pt", "--batch-size", "0"), 2, "batch-size"),
        (("report", "o.pt2", "-o", "page.txt"), 4, "must end in .html"),
        (("report", "o.pt2", "-o", "c.yaml/page.html"), 1, "File exists"),
        (("compress", "m.pt2", "--config", "empty.yaml", "-o", "p.pt2"), 4, "in empty.yaml"),
        (("compress", "m.pt2", "--config", ".", "-o", "p.pt2"), 2, "is a directory"),
        (
            ("compress", "cut.pt2", "--config", "c.yaml", "-o", "p.pt2"),
            3,
            "cut.pt2 is not a program",
        ),
        (
            ("compress", "m.pt2", "--config", "c.yaml", "-o", "p.pt2", "--report", "r.txt"),
            4,
            "must end in .json or .html",
        ),
        (
            ("compress", "m.pt2", "--config", "c.yaml", "-o", "p.pt2", "--shared-folder", "."),
            3,
            "is for the workers of --dask",
        ),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    with_data: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    command(with_data, "compress", "m.pt2", "--config", "c.yaml", "-o", "o.pt2")
    torch.save(torch.randn(8, 17), with_data / "wide.pt")
    (with_data / "empty.yaml").write_text("")
    (with_data / "cut.pt2").write_bytes((with_data / "m.pt2").read_bytes()[:2000])
    before = sorted(path.name for path in with_data.iterdir())
    done = command(with_data, *words)
    assert done.returncode == code, done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in with_data.iterdir()) == before


def test_report_that_exists_is_kept_and_nothing_else_is_written(folder: Path) -> None:
    (folder / "r.json").write_text("mine")
    words = ("compress", "m.pt2", "--config", "c.yaml", "-o", "o.pt2", "--report", "r.json")
    assert command(folder, *words).returncode == 7
    assert (folder / "r.json").read_text() == "mine"
    assert not (folder / "o.pt2").exists()
    assert command(folder, *words, "--overwrite").returncode == 0
    assert json.loads((folder / "r.json").read_text())["output"] == "o.pt2"


@pytest.mark.integration
def test_parameters_of_quantized_programs_are_counted(with_data: Path) -> None:
    options = ("--config", "q.yaml", "--data", "d.pt", "--batch-size", "2")
    done = command(with_data, "compress", "m.pt2", *options, "-o", "q.pt2")
    assert done.returncode == 0, done.stderr
    words = ("inspect", "--json")
    before, after = (
        json.loads(command(with_data, *words, name).stdout) for name in ("m.pt2", "q.pt2")
    )
    assert after["parameters"] == before["parameters"] == 16 * 32 + 32 + 32 * 4 + 4
    assert {
        row["name"]: row["bits_per_weight"] for row in after["modules"] if row["parameters"]
    } == {
        "0": pytest.approx(8 + 32 * 32 / 512),
        "2": pytest.approx(8 + 4 * 32 / 128),
    }
