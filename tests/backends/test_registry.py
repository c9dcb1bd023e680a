"""A target is a folder and a row: what follows from one more row, and what each row must have."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import graphopt
from graphopt.backends import ExportBackend, Target, load_backend, registry
from graphopt.backends.lowering import as_program
from graphopt.errors import ConfigError, LoweringError
from graphopt.palettization import KMeansPalettizer
from graphopt.rdo import RDOConfig
from graphopt.search.mixed_precision.sizes import SizeModel

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))

BACKEND = """
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file, save_file

from graphopt.backends.base import Artifact, Backend
from graphopt.backends.capabilities import Capabilities
from graphopt.backends.options import TargetOptions, in_shell, read_options
from graphopt.backends.verification import Evaluation
from graphopt.ir.graph_text import graph_text
from graphopt.passes import ExpandTables


@dataclass(frozen=True, kw_only=True)
class ToyOptions(TargetOptions):
    layout: str = field(default="rows", metadata=in_shell(("rows", "columns"), "Toy layout."))


class ToyArtifact(Artifact):
    def __init__(self, backend, program, text):
        super().__init__(backend, program)
        self.text = text

    def _write(self, path):
        gm = self.program.graph_module
        tensors = {name: value.detach().contiguous() for name, value in gm.state_dict().items()}
        save_file(tensors, path, metadata={"graph": self.text})


class ToyBackend(Backend):
    name = "Toy"
    capabilities = Capabilities(index_bits=(2, 4), padded_bits=((3, 4),))
    options = ToyOptions

    def unsupported(self, program):
        return ["sixteen inputs"] if len(program.example_args) == 16 else []

    def legalize(self):
        return (ExpandTables(),)

    def lower(self, program, **options):
        chosen = read_options(ToyOptions, self.name, options)
        return ToyArtifact(self, program, f"{chosen.layout}: {graph_text(program.graph_module)}")

    def evaluate(self, path, program, call):
        gm = program.copy().graph_module
        gm.load_state_dict(load_file(path))
        with torch.no_grad():
            return Evaluation((gm(*call[0], **call[1]),), "read the tensors back")
"""
ROW = ("toy", ".toy", "", "toy_target:ToyBackend")
# what a pull request would write into the registry
PATCH = """
from graphopt.backends import registry
rows = {t.name: (t.value, t.suffix, t.extra, t.backend) for t in registry.ExportBackend}
registry.ExportBackend = registry.Target("ExportBackend", {**rows, "Toy": ROW})
""".replace("ROW", repr(ROW))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy_target.py").write_text(BACKEND)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def toy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    rows = {t.name: (t.value, t.suffix, t.extra, t.backend) for t in ExportBackend}
    extended = Target("ExportBackend", {**rows, "Toy": ROW})
    monkeypatch.setattr(registry, "ExportBackend", extended)
    monkeypatch.delitem(sys.modules, "toy_target", raising=False)
    return registry.target_of("toy")


@pytest.fixture
def palettizer() -> KMeansPalettizer:
    torch.manual_seed(0)
    made = KMeansPalettizer(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval())
    made.prepare((X,))
    return made


def test_program_lowers_saves_and_verifies_by_name_and_by_suffix(
    toy: Target, palettizer: KMeansPalettizer, tmp_path: Path
) -> None:
    program = palettizer.program()
    artifact = graphopt.lower(program, "toy", layout="columns")
    path = artifact.save(tmp_path / "net.toy")
    assert artifact.verification.max_error == 0
    assert torch.equal(load_file(path)["0.bias"], program.graph_module.get_parameter("0.bias"))
    assert program.save(tmp_path / "by_suffix.toy").stat().st_size > 0
    with pytest.raises(LoweringError, match=r"net.bin must end in .toy"):
        artifact.save(tmp_path / "net.bin")


def test_finalized_module_is_in_its_form_and_keeps_the_program(
    toy: Target, palettizer: KMeansPalettizer
) -> None:
    finalized = palettizer.finalize(backend="toy")
    assert not any("lut_to_dense" in str(node.target) for node in finalized.graph.nodes)
    again = as_program(finalized, (X,)).graph_module
    assert sum("lut_to_dense" in str(node.target) for node in again.graph.nodes) == 2


def test_messages_and_sizes_know_it(toy: Target, palettizer: KMeansPalettizer) -> None:
    program = palettizer.program()
    with pytest.raises(LoweringError, match=r"no backend 'tflite'; there are \[.*'torch', 'toy'\]"):
        load_backend("tflite")
    with pytest.raises(LoweringError, match=r"use one of \[.*'\.toy'\]"):
        program.save("net.tflite")
    with pytest.raises(LoweringError, match=r"Toy has no option \['rows'\]; there is 'layout'"):
        graphopt.lower(program, "toy", rows=True)
    crowded = program.with_example(tuple(X for _ in range(16)))
    with pytest.raises(LoweringError, match=r"Toy cannot hold this program:\nsixteen inputs"):
        load_backend("toy").refuse_unsupported(crowded)
    assert SizeModel.of("toy", "float16", None).backend == "toy"


def shell(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    code = f"{PATCH}\nfrom graphopt.cli.main import run\nrun()"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "COLUMNS": "300"},
    )


@pytest.mark.slow
def test_shell_offers_it_with_its_options(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    torch.export.save(torch.export.export(model, (X,)), folder / "m.pt2")
    offered = shell(folder, "lower", "--help").stdout
    assert "torch|toy" in offered
    assert "--layout" in offered
    assert "rows|columns" in offered
    done = shell(folder, "lower", "m.pt2", "-o", "m.toy", "--layout", "columns")
    assert done.returncode == 0, done.stderr
    assert "read the tensors back: outputs differ by 0.00e+00" in done.stdout
    assert b"columns: " in (folder / "m.toy").read_bytes()
    refused = shell(folder, "lower", "m.pt2", "-o", "m.tflite")
    assert refused.returncode == 6
    assert "'.toy']" in refused.stderr
    assert "torch|toy" in shell(folder, "analyze", "--help").stdout


def test_rows_are_the_members_of_the_enumeration() -> None:
    assert ExportBackend("coreai") is ExportBackend.CoreAI == "coreai"
    assert str(ExportBackend.CoreAI) == "coreai"
    assert ExportBackend.CoreAI.suffix == ".aimodel"
    names = [target.value for target in ExportBackend]
    assert registry.targets() == tuple(ExportBackend)
    assert len({*names, *(target.suffix for target in ExportBackend)}) == 2 * len(names)


@pytest.mark.parametrize("target", list(ExportBackend))
def test_each_row_has_its_folder_its_extra_and_its_tests(target: ExportBackend) -> None:
    package = target.backend.partition(":")[0].rpartition(".")[0]
    folder = ROOT / "backends" / package.rpartition(".")[2]
    assert (folder / "backend.py").exists()
    assert package in PROJECT["tool"]["setuptools"]["packages"]
    independence = PROJECT["tool"]["importlinter"]["contracts"][-1]
    assert package in independence["modules"]
    if target.extra:
        assert target.extra in PROJECT["project"]["optional-dependencies"]
        assert (ROOT / "tests" / "backends" / folder.name).is_dir()
    assert load_backend(target).target is target


def test_configs_name_targets_by_the_registry() -> None:
    config = RDOConfig(target_bits=4, backend="coreml")
    assert config.backend is ExportBackend.CoreML
    assert "backend: coreml" in config.to_yaml()
    names = ", ".join(f"'{target.value}'" for target in ExportBackend)
    with pytest.raises(ConfigError, match=" or ".join(names.rsplit(", ", 1))):
        RDOConfig.from_dict({"target_bits": 4, "backend": "tflite"})
