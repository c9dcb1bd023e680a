"""Targets and full disks: the process lives, what was there stays, and the error is ours."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import ArtifactExistsError, OutputError

TARGETS = [
    pytest.param("torch", ".pt2"),
    pytest.param("coreai", ".aimodel", marks=[pytest.mark.coreai, pytest.mark.integration]),
    pytest.param("coreml", ".mlpackage", marks=[pytest.mark.coreml, pytest.mark.slow]),
    pytest.param("executorch", ".pte", marks=[pytest.mark.executorch, pytest.mark.slow]),
    pytest.param("onnx", ".onnx", marks=[pytest.mark.onnx, pytest.mark.integration]),
]


def artifact(target: str) -> graphopt.backends.Artifact:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    return graphopt.lower(graphopt.capture(net, (torch.randn(2, 64),)), target)


def content(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def save_with_little_room(made: graphopt.backends.Artifact, path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_192, 8_192))
    try:
        made.save(path, overwrite=True, verify=False)
    except OutputError:
        os._exit(42)
    os._exit(0)


@pytest.mark.parametrize(("target", "suffix"), TARGETS)
def test_a_file_that_may_not_grow_leaves_the_old_artifact(
    tmp_path: Path, target: str, suffix: str
) -> None:
    made, path = artifact(target), tmp_path / f"m{suffix}"
    made.save(path, verify=False)
    before = content(path)
    child = multiprocessing.get_context("fork").Process(
        target=save_with_little_room, args=(made, path)
    )
    child.start()
    child.join()
    assert child.exitcode == 42, "an error of ours, not an abort"
    assert content(path) == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.coreai
@pytest.mark.integration
def test_a_set_of_programs_whose_file_may_not_grow_is_an_error_of_ours(tmp_path: Path) -> None:
    net, x = nn.Linear(64, 64), (torch.ones(2, 64),)
    both = graphopt.lower({"first": (net, x), "second": (net, x)}, "coreai")
    child = multiprocessing.get_context("fork").Process(
        target=save_with_little_room, args=(both, tmp_path / "m.aimodel")
    )
    child.start()
    child.join()
    assert child.exitcode == 42, "an error of ours, not an abort"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("target", "suffix"), TARGETS)
def test_a_disk_of_24_kilobytes_is_too_small_and_says_so(
    tmp_path: Path, target: str, suffix: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(disk)], check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no right to mount a file system")
    try:
        with pytest.raises(OutputError):
            artifact(target).save(disk / f"m{suffix}", verify=False)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_artifacts_follow_links_and_keep_kinds_apart(tmp_path: Path) -> None:
    made = artifact("torch")
    real, link, folder = tmp_path / "real.pt2", tmp_path / "link.pt2", tmp_path / "folder.pt2"
    link.symlink_to(real)
    made.save(link, verify=False)
    assert (link.is_symlink(), real.is_file()) == (True, True)
    with pytest.raises(ArtifactExistsError):
        made.save(link, verify=False)
    folder.mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        made.save(folder, overwrite=True, verify=False)
    long = tmp_path / ("n" * 251 + ".pt2")
    made.save(long, verify=False)
    assert long.is_file()
    assert len(list(tmp_path.iterdir())) == 4
