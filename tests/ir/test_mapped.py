"""Weights that lie in files are compressed as those in memory, and take memory only while they are read."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path

import pytest
import torch
from helpers.shell import command
from safetensors.torch import save_file
from torch import nn

import graphopt
from graphopt.capture.mapped_archive import mapping_weights
from graphopt.errors import InputError
from graphopt.ir.mapped import is_mapped, kept_in_files, mapped_weights, moved_to, release
from graphopt.schemes.palettize import palettize
from graphopt.specs import PalettizationSpec

X = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)).half()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).half().eval()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = net()
    torch.export.save(torch.export.export(model, (X,)), tmp_path / "m.pt2")
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    return model, tmp_path


def resident(path: Path) -> int:
    """KiB of a file's mappings that are in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def test_safetensors_are_read_as_their_own_library_reads_them(tmp_path: Path) -> None:
    types = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.float64)
    tensors = {str(dtype): torch.randn(33, 5).to(dtype) for dtype in types}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "t.safetensors", {"note": "of no use"})
    found = mapped_weights(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert found[name].dtype is expected.dtype
        assert torch.equal(found[name], expected), name
        assert is_mapped(found[name]) == (name != "empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no .safetensors file|cannot be read"),
        (b"\xff" * 64, "is no .safetensors file"),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, "do not fit its shape"),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "beyond the end"),
        ({"w": {"dtype": "Q7", "shape": [4], "data_offsets": [0, 16]}}, "no tensor of torch"),
        ({"w": {"dtype": "U8", "shape": [-4], "data_offsets": [0, -4]}}, "do not fit|beyond"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "t.safetensors"
    if isinstance(content, dict):
        header = json.dumps(content).encode()
        content = len(header).to_bytes(8, "little") + header
    assert isinstance(content, bytes)
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        mapped_weights(path)


def test_memory_comes_back_and_what_was_written_stays(tmp_path: Path) -> None:
    values = torch.randn(1 << 20)
    tensor = moved_to(tmp_path, values)
    (path,) = tmp_path.iterdir()
    assert torch.equal(tensor, values)
    assert resident(path) > 4000
    tensor[5] = 7.0
    release(tensor)
    assert resident(path) < 400
    values[5] = 7.0
    assert torch.equal(tensor, values)
    assert path.read_bytes()[20:24] != values[5].numpy().tobytes()  # the file is as it was
    del tensor
    gc.collect()
    assert resident(path) == 0


def test_small_tensors_and_those_in_files_stay_where_they_are(tmp_path: Path) -> None:
    small = torch.randn(8)
    assert moved_to(tmp_path, small) is small
    once = moved_to(tmp_path, torch.randn(1 << 16))
    assert moved_to(tmp_path, once) is once
    palettized = palettize(torch.randn(512, 512), PalettizationSpec(n_bits=4))
    moved = kept_in_files(palettized, tmp_path)
    assert is_mapped(moved.indices)
    assert torch.equal(moved.dense(), palettized.dense())
    assert kept_in_files(palettized, None) is palettized


def test_programs_of_mapped_files_compress_to_the_same_bytes(
    saved: tuple[nn.Module, Path],
) -> None:
    _, folder = saved
    (folder / "codes").mkdir()
    with mapping_weights():
        program = graphopt.capture(folder / "m.pt2")
    assert all(is_mapped(each) for each in program.graph_module.parameters())
    assert not any(map(is_mapped, graphopt.capture(folder / "m.pt2").graph_module.parameters()))
    mapped = graphopt.compress(program, mmap_dir=folder / "codes")
    codes = mapped.graph_module.state_dict()["0.weight_indices"]
    assert is_mapped(codes)
    assert copy.deepcopy(codes).equal(codes)
    mapped.save(folder / "mapped.pt2")
    graphopt.compress(folder / "m.pt2").save(folder / "plain.pt2")
    assert (folder / "mapped.pt2").read_bytes() == (folder / "plain.pt2").read_bytes()


def test_a_module_of_the_meta_device_takes_mapped_weights(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    (folder / "codes").mkdir()
    with torch.device("meta"):
        hollow = net()
    hollow.load_state_dict(graphopt.mapped_weights(folder / "m.safetensors"), assign=True)
    program = graphopt.capture(hollow, (X,), dynamic_shapes=None)
    mapped = graphopt.compress(program, mmap_dir=folder / "codes").graph_module.state_dict()
    plain = graphopt.compress(model, (X,)).graph_module.state_dict()
    assert mapped.keys() == plain.keys()
    assert all(torch.equal(mapped[name], plain[name]) for name in plain)


def test_the_shell_compresses_with_little_memory(saved: tuple[nn.Module, Path]) -> None:
    _, folder = saved
    (folder / "c.yaml").write_text("global_config:\n  op_state_spec:\n    weight: {n_bits: 4}\n")
    words = ("compress", "m.pt2", "--config", "c.yaml", "-o")
    done = command(folder, *words, "low.pt2", "--low-memory")
    assert done.returncode == 0, done.stderr
    assert "outputs were not compared" in " ".join(done.stdout.split())
    assert command(folder, *words, "all.pt2").returncode == 0
    assert (folder / "low.pt2").read_bytes() == (folder / "all.pt2").read_bytes()
    names = {path.name for path in folder.iterdir()}
    assert names == {"m.pt2", "m.safetensors", "c.yaml", "low.pt2", "all.pt2"}
    refused = command(folder, *words, "-", "--low-memory")
    assert refused.returncode == 3
    assert "needs an --output that is a file" in " ".join(refused.stderr.split())
