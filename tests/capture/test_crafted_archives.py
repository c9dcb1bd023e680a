"""Archives that say what no writer says: each is refused with an error of ours, or computes as before."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hostile_files import Json, edited, members, saved_net, with_program
from torch import nn

import graphopt
from graphopt.errors import GraphOptError
from graphopt.palettization import KMeansPalettizerConfig

WEIGHTS = "data/weights/model_weights_config.json"
SAMPLES = "data/sample_inputs/model.pt"
EXAMPLE = (torch.ones(3, 4), {"z": torch.ones(5, 4)})


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_net(tmp_path_factory.mktemp("own") / "m.pt2")


def used(path: Path) -> str:
    """What becomes of a file in the hands of people: "refused" by one of ours, or "read"."""
    try:
        program = graphopt.capture(path)
        str(program)
        with torch.no_grad():
            program.module()(*program.example_args, **program.example_kwargs)
        graphopt.compress(program, None, KMeansPalettizerConfig(), progress=False)
    except GraphOptError:
        return "refused"
    return "read"


def changed_weights(change: Callable[[Json], object]) -> Callable[[Path, Path], Path]:
    """The first stored tensor of the list is described otherwise."""

    def make(own: Path, bad: Path) -> Path:
        config = json.loads(members(own)[WEIGHTS])
        change(next(iter(config["config"].values())))
        return edited(own, bad, {WEIGHTS: json.dumps(config).encode()})

    return make


def meta(name: str, value: Any) -> Callable[[Path, Path], Path]:
    return changed_weights(lambda payload: payload["tensor_meta"].update({name: value}))


def ints(*values: int) -> list[Json]:
    return [{"as_int": value} for value in values]


def repeated(payload: Json) -> None:
    """One number as 2^46 of them."""
    payload["tensor_meta"].update(sizes=ints(1 << 23, 1 << 23), strides=ints(0, 0))


def samples(make: Callable[[], Any]) -> Callable[[Path, Path], Path]:
    """Other example inputs, by torch.save."""

    def write(own: Path, bad: Path) -> Path:
        content = io.BytesIO()
        torch.save(make(), content)
        return edited(own, bad, {SAMPLES: content.getvalue()})

    return write


def raw_samples(make: Callable[[], bytes]) -> Callable[[Path, Path], Path]:
    return lambda own, bad: edited(own, bad, {SAMPLES: make()})


def scripted() -> bytes:
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), content)
    return content.getvalue()


def legacy_tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return content.getvalue()


def bomb() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(8 << 20))
    return content.getvalue()


def nested(levels: int) -> Any:
    value: Any = torch.ones(3, 4)
    for _ in range(levels):
        value = [value]
    return ((value, {"z": torch.ones(5, 4)}), {})


def program(change: Callable[[Json], object]) -> Callable[[Path, Path], Path]:
    return lambda own, bad: with_program(own, bad, lambda p: change(p) and None)


def parameter(name: str) -> Callable[[Path, Path], Path]:
    """A weight of another name, everywhere."""

    def make(own: Path, bad: Path) -> Path:
        kept = members(own)
        old, new = json.dumps("linear.weight"), json.dumps(name)
        names = ("models/model.json", WEIGHTS)
        changes = {each: kept[each].decode().replace(old, new).encode() for each in names}
        return edited(own, bad, changes)  # type: ignore[arg-type]

    return make


def each_node(program: Json, change: Callable[[Json], object]) -> None:
    for node in program["graph_module"]["graph"]["nodes"]:
        change(node)


def with_metadata(key: str, text: str) -> Callable[[Path, Path], Path]:
    def change(p: Json) -> None:
        each_node(p, lambda node: node.setdefault("metadata", {}).update({key: text}))

    return program(change)


def twice(p: Json) -> None:
    p["graph_module"]["graph"]["nodes"].append(p["graph_module"]["graph"]["nodes"][0])


def reversed_nodes(p: Json) -> None:
    p["graph_module"]["graph"]["nodes"].reverse()


def raw(write: Callable[[zipfile.ZipFile], object]) -> Callable[[Path, Path], Path]:
    """The members as they were, and what `write` adds to the archive."""

    def make(own: Path, bad: Path) -> Path:
        with zipfile.ZipFile(bad, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, content in members(own).items():
                archive.writestr(f"m/{name}", content)
            write(archive)
        return bad

    return make


def link_entry(archive: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("m/data/weights/weight_99")
    info.external_attr = 0o120777 << 16
    archive.writestr(info, "/etc/passwd")


def prefixed(own: Path, bad: Path) -> Path:
    """An archive within the bytes before the archive."""
    bad.write_bytes(saved_net(bad.with_suffix(".other.pt2")).read_bytes() + own.read_bytes())
    return bad


def commented(own: Path, bad: Path) -> Path:
    """A comment that is the end of another archive."""
    content = edited(own, bad, {}).read_bytes()
    with zipfile.ZipFile(bad, "a") as archive:
        archive.comment = content[-22:]
    return bad


def duplicate_keys(own: Path, bad: Path) -> Path:
    text = members(own)["models/model.json"].decode()
    hostile = '{"guards_code": ["__import__(\'os\').abort()"], ' + text[1:]
    return edited(own, bad, {"models/model.json": hostile.encode()})


REFUSED: dict[str, Callable[[Path, Path], Path]] = {
    "sizes beyond the bytes": meta("sizes", ints(1 << 40, 4)),
    "negative sizes": meta("sizes", ints(-4, -4)),
    "strides beyond the bytes": meta("strides", ints(1 << 40, 1)),
    "offset beyond the bytes": meta("storage_offset", {"as_int": 1 << 40}),
    "negative offset": meta("storage_offset", {"as_int": -64}),
    "one number as 2^46": changed_weights(repeated),
    "unknown type": meta("dtype", 999),
    "device that is not there": meta("device", {"type": "cuda", "index": 77}),
    "file in another folder": changed_weights(lambda p: p.update(path_name="../weight_0")),
    "file that is not there": changed_weights(lambda p: p.update(path_name="weight_77")),
    "example of TorchScript": raw_samples(scripted),
    "example in a tar": raw_samples(legacy_tar),
    "example that is a bomb": raw_samples(bomb),
    "example of one number as 2^46": samples(
        lambda: ((torch.zeros(1).expand(1 << 46), {"z": torch.ones(5, 4)}), {})
    ),
    "example nested 150 levels": samples(lambda: nested(150)),
    "example of texts": samples(lambda: (("a", "b"), {})),
    "example of another kind": samples(lambda: torch.ones(3)),
    "example without data": samples(
        lambda: ((torch.ones(3, 4, device="meta"), {"z": torch.ones(5, 4)}), {})
    ),
    "example that is sparse": samples(
        lambda: ((torch.ones(3, 4).to_sparse(), {"z": torch.ones(5, 4)}), {})
    ),
    "example of other sizes": samples(lambda: ((torch.ones(3, 9), {"z": torch.ones(5, 9)}), {})),
    "parameter __class__": parameter("linear.__class__"),
    "parameter forward": parameter("forward"),
    "parameter without name": parameter(""),
    "parameter of dots": parameter("a..b"),
    "values used before they are made": program(reversed_nodes),
    "a value made twice": program(twice),
    "an op without arguments": program(lambda p: each_node(p, lambda n: n.update(inputs=[]))),
    "an unknown schema": program(lambda p: p["schema_version"].update(major=99)),
    "a range that is empty": program(
        lambda p: p.update(range_constraints={"s77": {"min_val": 5, "max_val": 2}})
    ),
    "no outputs": program(lambda p: p["graph_module"]["graph"].update(outputs=[])),
    "a member outside": raw(lambda z: z.writestr("m/../../evil", "x")),
    "an absolute member": raw(lambda z: z.writestr("/etc/evil", "x")),
    "a member twice": raw(lambda z: z.writestr("m/models/model.json", "{}")),
    "a member with a control character": raw(lambda z: z.writestr("m/models/a\nb.json", "{}")),
    "Windows separators": raw(lambda z: z.writestr("m/models\\..\\evil.json", "{}")),
}
EITHER: dict[str, Callable[[Path, Path], Path]] = {
    "unknown layout": meta("layout", 999),
    "a link as a member": raw(link_entry),
    "an extra file outside": raw(lambda z: z.writestr("m/extra/../../evil", "x")),
    "an archive before the archive": prefixed,
    "the end of an archive in the comment": commented,
    "keys twice": duplicate_keys,
    "half of a surrogate as metadata": with_metadata("stack_trace", "\ud800"),
    "functions as metadata": with_metadata("source_fn_stack", "a,torch.os.abort"),
    "5,000 levels as metadata": with_metadata("custom", "[" * 5_000),
    "modules as metadata": with_metadata("nn_module_stack", "a,b,os.abort;" * 20),
    "long names": parameter("x" * 100_000),
    "numbers that are none": program(
        lambda p: p.update(range_constraints={"s77": {"min_val": float("nan"), "max_val": 1e999}})
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_program_says_is_refused(own: Path, tmp_path: Path, kind: str) -> None:
    assert used(REFUSED[kind](own, tmp_path / "bad.pt2")) == "refused"
    assert not (tmp_path.parent / "evil").exists()


@pytest.mark.parametrize("kind", EITHER)
def test_what_says_nothing_of_the_program_does_nothing(
    own: Path, tmp_path: Path, kind: str
) -> None:
    assert used(EITHER[kind](own, tmp_path / "bad.pt2")) in ("refused", "read")
    assert not (tmp_path.parent / "evil").exists()


def test_the_program_itself_is_read(own: Path) -> None:
    assert used(own) == "read"
