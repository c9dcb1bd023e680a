"""Files that are cut, changed in a bit, or put together from two: what they were, or our error."""

from __future__ import annotations

import functools
import random
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.fuzzing import budget, counted
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.cli.mixed_precision import read_data
from graphopt.fitting.sensitivity.storage import load_sensitivities, save_sensitivities
from graphopt.mixed_precision import Recipe, SensitivityTable, analyze
from graphopt.palettization import KMeansPalettizerConfig

X = torch.linspace(-1, 1, 24).reshape(3, 8)
FOLDER = Path(tempfile.mkdtemp(prefix="graphopt-fuzz-"))


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))


def forward(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module(X)


@functools.cache
def archive(seed: int, compressed: bool) -> bytes:
    path = FOLDER / f"{seed}{compressed}.pt2"
    if compressed:
        graphopt.compress(net(seed), (X,), KMeansPalettizerConfig()).save(path)
    else:
        torch.export.save(torch.export.export(net(seed), (X,)), path)
    return path.read_bytes()


@functools.cache
def table(mode: str) -> bytes:
    path = FOLDER / f"{mode}.jsonl"
    analyze(net(0), (X,), [2, 4], [X], "mse", mode=mode, path=path)  # type: ignore[arg-type]
    return path.read_bytes()


@functools.cache
def recipe() -> bytes:
    measured = analyze(net(0), (X,), [2, 4], [X], "mse")
    return measured.recipe(target_bpw=6).save(FOLDER / "r.yaml").read_bytes()


def changed(content: bytes, data: st.DataObject, other: bytes) -> bytes:
    """Cut, changed in some bits, or with a stretch of another file in it."""
    how = data.draw(st.sampled_from(["cut", "flip", "flip", "flip", "splice", "zero", "as it was"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if how == "cut":
        return content[:place]
    if how == "flip":
        result = bytearray(content)
        for _ in range(data.draw(st.integers(1, 2))):
            result[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        return bytes(result)
    if how == "zero":
        size = data.draw(st.integers(1, 64))
        return content[:place] + bytes(size) + content[place + size :]
    if how == "splice":
        start = data.draw(st.integers(0, len(other) - 1))
        return content[:place] + other[start:]
    return content


def stored(content: bytes, suffix: str) -> Path:
    path = FOLDER / f"broken{suffix}"
    path.write_bytes(content)
    return path


@budget(10, share=0.5)
@given(data=st.data(), compressed=st.booleans())
def test_programs_compute_what_they_did_or_are_refused(
    data: st.DataObject, compressed: bool
) -> None:
    content = changed(archive(0, compressed), data, archive(1, compressed))
    path = stored(content, ".pt2")
    wanted = [outputs_of(seed, compressed) for seed in (0, 1)]
    with counted("file .pt2", whole=content == archive(0, compressed)):
        got = forward(graphopt.capture(path).module())
        assert any(torch.equal(got, each) for each in wanted)


@functools.cache
def outputs_of(seed: int, compressed: bool) -> Tensor:
    path = stored(archive(seed, compressed), f"-{seed}.pt2")
    return forward(graphopt.capture(path).module())


@budget(8, share=0.3)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_programs_of_exchanged_values_load_or_are_refused(data: st.DataObject, seed: int) -> None:
    """Texts inside are changed with right checksums, as one who means harm would do."""
    path = FOLDER / "changed.pt2"
    draw = random.Random(seed)
    with (
        zipfile.ZipFile(stored(archive(0, False), "-0.pt2")) as given_,
        zipfile.ZipFile(path, "w") as result,
    ):
        names = [name for name in given_.namelist() if name.endswith((".json", ".pt"))]
        chosen = data.draw(st.sampled_from(names))
        for name in given_.namelist():
            content = given_.read(name)
            if name == chosen:
                content = mangled(content, draw)
            result.writestr(name, content)
    with counted("file .pt2 of changed texts"):
        forward(graphopt.capture(path).module())


def mangled(content: bytes, draw: random.Random) -> bytes:
    words = [
        b'"',
        b"{}",
        b"[]",
        b"null",
        b"-1",
        b"1e999",
        b"9" * 30,
        b"torch.os.system",
        b"'",
        b"\\u0000",
    ]
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(content))
        length = draw.choice([0, 1, 5, 40])
        content = content[:place] + draw.choice(words) + content[place + length :]
    return content


READERS: dict[str, tuple[Callable[[], bytes], Callable[[], bytes], str, Callable[[Path], Any]]] = {
    "table": (
        lambda: table("exact"),
        lambda: table("fast"),
        ".jsonl",
        lambda path: SensitivityTable.load(path).recipe(target_bpw=8),
    ),
    "fast table": (
        lambda: table("fast"),
        lambda: table("exact"),
        ".jsonl",
        lambda path: SensitivityTable.load(path).recipe(target_bpw=8),
    ),
    "resumed table": (
        lambda: table("exact"),
        lambda: table("fast"),
        ".jsonl",
        lambda path: same_values(path),
    ),
    "recipe": (recipe, recipe, ".yaml", lambda path: Recipe.load(path).to_config()),
    "sensitivities": (
        lambda: sensitivities(0),
        lambda: sensitivities(1),
        ".safetensors",
        lambda path: load_sensitivities(path, {"a": torch.Size([4, 4])}),
    ),
    "data .pt": (
        lambda: data_file(".pt"),
        lambda: data_file(".npy"),
        ".pt",
        lambda p: read_data(p, 2),
    ),
    "data .npy": (
        lambda: data_file(".npy"),
        lambda: data_file(".pt"),
        ".npy",
        lambda p: read_data(p, 2),
    ),
    "data .npz": (
        lambda: data_file(".npz"),
        lambda: data_file(".npy"),
        ".npz",
        lambda p: read_data(p, 2),
    ),
}


def same_values(path: Path) -> None:
    got = analyze(net(0), (X,), [2, 4], [X], "mse", mode="exact", path=path)
    assert got.values() == SensitivityTable.load(stored(table("exact"), ".whole")).values()


@functools.cache
def sensitivities(seed: int) -> bytes:
    torch.manual_seed(seed)
    values = {"a": torch.rand(4, 4), "b": torch.rand(2)}
    return save_sensitivities(FOLDER / f"s{seed}", values).read_bytes()


@functools.cache
def data_file(suffix: str) -> bytes:
    path = FOLDER / f"data{suffix}"
    if suffix == ".pt":
        torch.save([X, X], path)
    elif suffix == ".npy":
        np.save(path, X.numpy())
    else:
        np.savez(path, x=X.numpy(), y=X.numpy())
    return path.read_bytes()


@budget(30)
@given(data=st.data(), kind=st.sampled_from(sorted(READERS)))
def test_files_of_data_and_results_are_read_or_refused(data: st.DataObject, kind: str) -> None:
    whole_file, other, suffix, read = READERS[kind]
    content = changed(whole_file(), data, other())
    path = stored(content, suffix)
    with counted(f"file {kind}", whole=content == whole_file()):
        read(path)
