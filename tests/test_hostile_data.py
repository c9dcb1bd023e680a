"""Data, results and texts of strangers: what is larger than it says, nested, or leads elsewhere is refused."""

from __future__ import annotations

import itertools
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from graphopt import unpacked
from graphopt.audited import Limits, parse_json, parse_yaml, read_arrays, read_tensors
from graphopt.errors import ConfigError, GraphOptError, InputError
from graphopt.files import inside
from graphopt.fitting.sensitivity.storage import load_sensitivities
from graphopt.mixed_precision import Recipe, SensitivityTable
from graphopt.run.record_file import sealed


def test_numbers_that_take_the_square_of_their_length_are_refused() -> None:
    for text in ("1" + ":59" * 100_000, "!!int '1" + ":1" * 5_000 + "'", "1:1" + ":1" * 900 + ".5"):
        with pytest.raises(ConfigError, match="a number of"):
            parse_yaml(f"a: {text}", "config")
    assert parse_yaml(f"a: '{'1:' * 900}'", "config") == {"a": "1:" * 900}


def test_lists_are_counted_before_they_are_made() -> None:
    for text in ("[" + "[]," * 5_000 + "[]]", b"[" + b"{}," * 5_000 + b"{}]"):
        with pytest.raises(ConfigError, match="more than 1,000 values"):
            parse_json(text, "table", Limits(values=1_000))
    # commas within texts are none between values
    assert parse_json('["' + "," * 3_000 + '"]', "table", Limits(values=1_000)) == ["," * 3_000]


def test_tensors_that_repeat_a_number_for_gigabytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save([torch.zeros(1).expand(1 << 40)], path)
    with pytest.raises(InputError, match="gigabytes larger"):
        read_tensors(path)
    torch.save({"a": torch.zeros(1).expand(1 << 10)}, path)
    assert read_tensors(path)["a"].shape == (1 << 10,)


def test_containers_of_great_depth_are_refused(tmp_path: Path) -> None:
    value: object = torch.zeros(1)
    for _ in range(150):
        value = [value]
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(InputError, match="nested more than"):
        read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("read", [read_arrays, read_tensors])
def test_archives_that_unpack_to_more_than_they_have_are_refused(
    tmp_path: Path, read: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacked, "_SPARE", 1 << 20)
    path = tmp_path / ("x.npz" if read is read_arrays else "x.pt")
    np.savez_compressed(path.with_suffix(".npz"), x=np.zeros(1 << 20, np.float32))
    if path.suffix == ".pt":
        path.with_suffix(".npz").rename(path)
    with pytest.raises(InputError, match="zip bomb"):
        read(path)  # type: ignore[operator]


def test_arrays_of_objects_and_headers_that_lie_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError):
        read_arrays(path)
    np.save(path, np.zeros((2, 2), np.float32))
    path.write_bytes(path.read_bytes().replace(b"(2, 2)", b"(9**9,)"))
    with pytest.raises(InputError):
        read_arrays(path)
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as archive:
        archive.writestr("../../x.npy", b"no array")
    with pytest.raises(InputError):
        read_arrays(tmp_path / "y.npz")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ".."])
def test_names_of_files_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no path inside"):
        inside(tmp_path, "model", "..", name)
    assert inside(tmp_path, "model", "weights.bin") == tmp_path / "model" / "weights.bin"


def test_sensitivities_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    shapes = {"a": torch.Size([2])}
    for content in (
        b"",
        (1 << 60).to_bytes(8, "little") + b"{}",
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x10\0\0\0\0\0\0\0" + b"[" * 16,
    ):
        path.write_bytes(content)
        with pytest.raises(GraphOptError):
            load_sensitivities(path, shapes)


HOSTILE_RECIPES = {
    "python objects": "recipe: !!python/object/apply:os.abort []\nlayers: {}\n",
    "aliases of aliases": "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{c}: &{c} [{','.join(['*' + p] * 10)}]\n" for p, c in itertools.pairwise("abcdefg")
    ),
    "itself": "&a [*a]",
    "a list": "[recipe]",
    "no layers": "recipe: {}\nlayers: 3\n",
    "keys of mappings": "? {a: b}\n: c\n",
}


@pytest.mark.parametrize("kind", HOSTILE_RECIPES)
def test_recipes_of_strangers_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(HOSTILE_RECIPES[kind])
    with pytest.raises(GraphOptError):
        Recipe.load(path)


@pytest.mark.parametrize(
    "head",
    [
        {"format": "graphopt.sensitivities", "version": 1},
        {"format": ["x"], "version": {}},
        {"format": "graphopt.sensitivity-table", "version": 10**30, "layers": {"a": None}},
    ],
)
def test_tables_that_are_sealed_and_wrong_are_refused(tmp_path: Path, head: dict) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(sealed(head) + b"\n" + sealed({"layer": 3}) + b"\n")
    with pytest.raises(GraphOptError):
        SensitivityTable.load(path)
