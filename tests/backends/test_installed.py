"""A target of another package is found by its entry point, everywhere that targets are named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "graphopt-toy"
version = "1.0"

[project.entry-points."graphopt.backends"]
toy = "toy_row:ROW"
again = "toy_row:TAKEN"
broken = "toy_row:NOTHING"

[tool.setuptools]
py-modules = ["toy_row", "toy_target"]
"""
ROWS = """
ROW = (".toy", "", "toy_target:ToyBackend")
TAKEN = (".pt2", "", "toy_target:ToyBackend")
"""
BACKEND = """
from typing import Any

import torch

from graphopt.backends.base import Artifact, Backend
from graphopt.backends.capabilities import Capabilities
from graphopt.backends.verification import Evaluation


class ToyArtifact(Artifact):
    def _write(self, path):
        torch.save(dict(self.program.graph_module.state_dict()), path)


class ToyBackend(Backend):
    name = "Toy"
    capabilities = Capabilities(index_bits=(2, 4))

    def unsupported(self, program):
        return []

    def legalize(self):
        return ()

    def lower(self, program, **options: Any):
        return ToyArtifact(self, program)

    def evaluate(self, path, program, call):
        gm = program.copy().graph_module
        gm.load_state_dict(torch.load(path))
        with torch.no_grad():
            return Evaluation((gm(*call[0], **call[1]),), "read the tensors back")
"""
SCRIPT = """
import sys
import torch
from torch import nn
import graphopt
from graphopt.backends import load_backend
from graphopt.backends.registry import target_of
from graphopt.rdo import RDOConfig

row = target_of("toy")
assert (row.suffix, row.extra) == (".toy", "")
assert graphopt.ExportBackend("toy") is row
assert RDOConfig(target_bits=4, backend="toy").backend is row
assert "backend: toy" in RDOConfig(target_bits=4, backend="toy").to_yaml()
assert load_backend("toy").target is row
assert "toy_target" in sys.modules
x = torch.randn(2, 4)
artifact = graphopt.lower(nn.Linear(4, 3).eval(), "toy", x)
artifact.save("net.toy")
assert artifact.verification.max_error == 0
assert {"again", "broken"}.isdisjoint(graphopt.ExportBackend)
"""


@pytest.mark.slow  # makes a package and installs it
def test_target_of_an_installed_package_is_one_of_the_targets(tmp_path: Path) -> None:
    source, installed = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "toy_row.py").write_text(ROWS)
    (source / "toy_target.py").write_text(BACKEND)
    words = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [sys.executable, "-m", "pip", *words, "--target", installed, source],
        check=True,
        capture_output=True,
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{installed}", "COLUMNS": "300"}

    def python(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    done = python("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    # what cannot be read, or is here already, is left out and named
    assert "target again (toy_row:TAKEN) is left out: there is one" in done.stderr
    assert "target broken (toy_row:NOTHING) is left out" in done.stderr
    offered = python("-c", "from graphopt.cli.main import run; run()", "analyze", "--help")
    assert "torch|toy" in offered.stdout
