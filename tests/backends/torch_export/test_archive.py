"""What `.pt2` files hold: codes and deflated texts, aligned tensors, no lines of the user's source."""

from __future__ import annotations

import functools
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphopt


def net() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@functools.cache
def compressed() -> graphopt.Program:
    return graphopt.compress(net(), (torch.randn(1, 9, 32),), {"palettization": {}})


def saved(path: Path, **options: Any) -> Path:
    # what is loaded is compared elsewhere
    graphopt.lower(compressed(), "torch", **options).save(path, verify=False)
    return path


def test_file_is_little_larger_than_its_weights(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.pt2")
    weights = sum(p.numel() // 2 if p.ndim > 1 else 4 * p.numel() for p in net().parameters())
    assert path.stat().st_size <= 1.1 * weights + 64 * 1024
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_stay_aligned_and_uncompressed(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.pt2")
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = [each for each in archive.infolist() if "/data/weights/" in each.filename]
    assert len(members) > 8
    for member in members:
        if member.filename.endswith(".json"):
            continue
        name, extra = struct.unpack_from("<HH", content, member.header_offset + 26)
        assert (member.header_offset + 30 + name + extra) % 64 == 0
        assert member.compress_size == member.file_size


def test_lines_of_the_source_are_kept_on_request_only(tmp_path: Path) -> None:
    def texts(path: Path) -> str:
        with zipfile.ZipFile(path) as archive:
            return archive.read(
                next(n for n in archive.namelist() if n.endswith("model.json"))
            ).decode()

    plain = texts(saved(tmp_path / "plain.pt2"))
    assert "transformer.py" not in plain
    assert "nn_module_stack" in plain
    assert "transformer.py" in texts(saved(tmp_path / "traced.pt2", stack_traces=True))
