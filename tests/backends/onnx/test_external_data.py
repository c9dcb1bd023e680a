"""Weights beside a model, on links, under long names, with other writers and after kills."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt import files
from graphopt.backends import Artifact
from graphopt.backends.onnx import backend as onnx_backend
from graphopt.backends.onnx import external_data
from graphopt.backends.onnx.check import session_of
from graphopt.backends.onnx.external_data import data_of, settle_data
from graphopt.errors import OutputError

pytestmark = [pytest.mark.onnx, pytest.mark.integration]


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return graphopt.lower(nn.Linear(64, 8).eval(), "onnx", torch.ones(2, 64))


@pytest.fixture(autouse=True)
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_backend, "MOST_BYTES", 1_000)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_data_lie_beside_the_file_that_a_link_names(artifact: Artifact, tmp_path: Path) -> None:
    real, link = tmp_path / "away" / "real.onnx", tmp_path / "link.onnx"
    link.symlink_to(real)
    artifact.save(link, verify=False)
    assert names(real.parent) == ["real.onnx", "real.onnx.data"]
    assert names(tmp_path) == ["away", "link.onnx"]
    session_of(real)
    assert artifact.size > 4 * 64 * 8


@pytest.mark.parametrize("length", [250, 251, 255])
def test_the_longest_names_have_data_too(artifact: Artifact, tmp_path: Path, length: int) -> None:
    path = tmp_path / ("ü" * 60 + "n" * (length - 125) + ".onnx")
    for _ in range(2):
        artifact.save(path, verify=False, overwrite=True)
        assert names(tmp_path) == sorted([path.name, data_of(path).name])
    session_of(path)


def test_data_of_another_writer_stay_with_its_model(artifact: Artifact, tmp_path: Path) -> None:
    """The other one has put its model into the place before this one's data got their name."""
    path, written = tmp_path / "m.onnx", tmp_path / ".m.late.onnx.data"
    artifact.save(path, verify=False)
    held = data_of(path).read_bytes()
    written.write_bytes(b"another model's")
    settle_data(path, written)
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    # a small model that was replaced by a large one
    settle_data(path, None)
    assert data_of(path).read_bytes() == held
    session_of(path)


def test_a_model_is_whole_where_its_data_cannot_be_named(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "m.onnx"
    with monkeypatch.context() as full:
        full.setattr(external_data.os, "link", refuse)
        full.setattr(external_data.shutil, "copyfile", refuse)
        artifact.save(path, verify=False)
    assert len(names(tmp_path)) == 2
    session_of(path)
    artifact.save(path, verify=False, overwrite=True)
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]


def test_a_full_disk_leaves_the_old_model_with_its_data(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "m.onnx"
    artifact.save(path, verify=False)
    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OutputError, match="No space"):
        artifact.save(path, verify=False, overwrite=True)
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    session_of(path)


def test_data_that_a_killed_writer_left_go_with_the_next(
    artifact: Artifact, tmp_path: Path
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / f".m.{files._HOST}-{gone.pid}-00000000.onnx.data"
    other = tmp_path / f".other.{files._HOST}-{gone.pid}-00000000.onnx.data"
    left.touch()
    other.touch()
    artifact.save(tmp_path / "m.onnx", verify=False)
    assert names(tmp_path) == [other.name, "m.onnx", "m.onnx.data"]
