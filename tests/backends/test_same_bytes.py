"""Saving what is equal gives equal bytes: later, elsewhere, in another process, under another name."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.quantization import QuantizerConfig

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = {
    "torch": ".pt2",
    "coreai": ".aimodel",
    "coreml": ".mlpackage",
    "executorch": ".pte",
    "onnx": ".onnx",
}
TARGETS = [
    pytest.param("torch"),
    pytest.param("coreai", marks=[pytest.mark.coreai, pytest.mark.integration]),
    pytest.param("coreml", marks=[pytest.mark.coreml, pytest.mark.integration]),
    pytest.param("executorch", marks=[pytest.mark.executorch, pytest.mark.slow]),
    pytest.param("onnx", marks=[pytest.mark.onnx, pytest.mark.integration]),
]


def digest(path: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            name = file.relative_to(path) if path.is_dir() else ""
            total.update(f"{name}\0".encode() + file.read_bytes())
    return total.hexdigest()


def save(target: str, path: Path) -> str:
    """The digest of an artifact with tables, whose model is captured anew."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 8))
    x = torch.randn(2, 2, 6, 6)
    config = KMeansPalettizerConfig()
    made = graphopt.compress(net, (x,), config, backend=target)
    return digest(made.save(path, verify=False))


@pytest.mark.parametrize("target", TARGETS)
def test_saving_twice_gives_the_same_bytes(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(target, tmp_path / f"first{SUFFIXES[target]}")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    (tmp_path / "other").mkdir()
    assert save(target, tmp_path / "other" / f"second-name{SUFFIXES[target]}") == first


@pytest.mark.slow
@pytest.mark.parametrize("target", SUFFIXES)
def test_other_processes_write_the_same_bytes(tmp_path: Path, target: str) -> None:
    code = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_same_bytes import save\n"
        "print(save(sys.argv[2], pathlib.Path(sys.argv[3])))\n"
    )
    found = set()
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}{SUFFIXES[target]}"
        words = [sys.executable, "-c", code, str(Path(__file__).parent), target, str(path)]
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
        found.add(done.stdout.splitlines()[-1])
    assert len(found) == 1


def test_activations_and_their_ranges_are_written_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(4, 8)
    paths = [tmp_path / "a.pt2", tmp_path / "b.pt2"]
    for path in paths:
        made = graphopt.compress(net, (x,), QuantizerConfig(), calibration_data=[x])
        made.save(path, verify=False)
    assert paths[0].read_bytes() == paths[1].read_bytes()
