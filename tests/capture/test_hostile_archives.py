"""A .pt2 of someone else runs nothing: not when it is opened, and not in any later step."""

from __future__ import annotations

import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.hostile_files import Json, Runs, edited, members, saved_net, with_program
from helpers.shell import command
from torch import Tensor, nn

import graphopt
from graphopt.capture.archive_check import check_archive
from graphopt.errors import CaptureError


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_net(tmp_path_factory.mktemp("own") / "m.pt2")


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "it ran")


def first_expression(program: Json) -> Json:
    sizes = [
        size["as_expr"]
        for value in program["graph_module"]["graph"]["tensor_values"].values()
        for size in value["sizes"]
        if "as_expr" in size
    ]
    return sizes[0]


def rename(program: Json, old: str, new: str) -> Json:
    return json.loads(json.dumps(program).replace(json.dumps(old), json.dumps(new)))


def guard(program: Json, code: str) -> None:
    program["guards_code"] = [code]


def size(program: Json, code: str) -> None:
    first_expression(program)["expr_str"] = code


def target(program: Json, code: str) -> None:
    node = program["graph_module"]["graph"]["nodes"][0]
    node["target"] = "torch.os.system"
    node["inputs"] = [{"name": "", "arg": {"as_string": code}, "kind": 1}]


def loader(program: Json, code: str) -> None:
    program["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.load_library"


def operator(program: Json, code: str) -> None:
    program["graph_module"]["graph"]["nodes"][0]["target"] = "_operator.methodcaller"


def file_op(program: Json, code: str) -> None:
    program["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"


def value_name(program: Json, code: str) -> None:
    changed = rename(program, "x", f"x=[{code}]")
    program.clear()
    program.update(changed)


def buffer_name(program: Json, code: str) -> None:
    for spec in program["graph_module"]["signature"]["input_specs"]:
        if "buffer" in spec:
            spec["buffer"]["buffer_name"] = f'kept.0" + str({code}) + "'


def constant_input(program: Json, code: str) -> None:
    program["graph_module"]["graph"]["inputs"].append({"as_string": f"' or {code} or '"})
    spec = {"name": "mode", "value": {"as_string": f"' or {code} or '"}}
    program["graph_module"]["signature"]["input_specs"].append({"constant_input": spec})


def tree_enum(program: Json, code: str) -> None:
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    context = json.dumps([{"__enum__": True, "fqn": "hostile_module:E", "name": "A"}])
    leaf = {"type": None, "context": None, "children_spec": []}
    spec = {"type": "builtins.dict", "context": context, "children_spec": [leaf]}
    signature["out_spec"] = json.dumps([1, spec])


def tree_factory(program: Json, code: str) -> None:
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    context = {
        "default_factory_module": "hostile_module",
        "default_factory_name": "x",
        "dict_context": [],
    }
    spec = {"type": "collections.defaultdict", "context": context, "children_spec": []}
    signature["out_spec"] = json.dumps([1, spec])


def script_object(program: Json, code: str) -> None:
    named = {"name": "obj", "class_fqn": "__torch__.torch.classes.x.Y"}
    program["graph_module"]["graph"]["custom_obj_values"] = {"obj": named}


HOSTILE: dict[str, Callable[[Json, str], None]] = {
    function.__name__: function
    for function in (
        *(guard, size, target, loader, operator, file_op, value_name, buffer_name),
        *(constant_input, tree_enum, tree_factory, script_object),
    )
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_graph_that_would_run_code_is_refused_before_torch_reads_it(
    own: Path, tmp_path: Path, runs: Runs, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "hostile_module.py"
    module.write_text(f"x = list\n{runs.code}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    bad = with_program(own, tmp_path / "bad.pt2", lambda p: HOSTILE[kind](p, runs.code))
    with pytest.raises(CaptureError, match=r"could run code.*trust=True\) or --trust"):
        graphopt.capture(bad)
    assert not runs.happened
    assert "hostile_module" not in sys.modules


def test_what_is_refused_does_run_where_the_file_is_trusted(
    own: Path, tmp_path: Path, runs: Runs
) -> None:
    """So the attack is real, and `trust` does what it says."""
    bad = with_program(own, tmp_path / "bad.pt2", lambda p: guard(p, f"{runs.code} is not None"))
    graphopt.capture(bad, trust=True)
    assert runs.happened


@pytest.mark.parametrize(
    "member", ["data/sample_inputs/model.pt", "data/weights/model.pt", "data/constants/model.pt"]
)
def test_a_pickle_of_anything_but_tensors_is_refused(
    own: Path, tmp_path: Path, runs: Runs, member: str
) -> None:
    content = io.BytesIO()
    torch.save(((runs,), {}), content)
    bad = edited(own, tmp_path / "bad.pt2", {member: content.getvalue()})
    with pytest.raises(CaptureError, match=member):
        graphopt.capture(bad)
    assert not runs.happened


def test_a_weight_that_is_a_pickle_and_objects_of_classes_are_refused(
    own: Path, tmp_path: Path, runs: Runs
) -> None:
    listed = "data/weights/model_weights_config.json"
    config = json.loads(members(own)[listed])
    next(iter(config["config"].values()))["use_pickle"] = True
    payload = pickle.dumps(runs)
    weight = next(iter(config["config"].values()))["path_name"]
    changes = {listed: json.dumps(config).encode(), f"data/weights/{weight}": payload}
    opaque = {"data/constants/opaque_obj_0": payload}
    compiled = {"data/aotinductor/model/model.so": b"\x7fELF"}
    for name, change in (("weight", changes), ("opaque", opaque), ("library", compiled)):
        with pytest.raises(CaptureError, match="could run code"):
            graphopt.capture(edited(own, tmp_path / f"{name}.pt2", change))
    assert not runs.happened


@pytest.mark.parametrize(
    "code",
    [
        "'a' * 30_000_000_000 * 3 == L['x']",
        "(" * 5_000 + "1" + ")" * 5_000,
        "9**9**9**9 > L['x'].size()[0]",
        "L['x'].size()[0] << 10**10 == 0",
        "L['x'].__class__ == 1",
        "L['x\"]; import os'].size()[0] == 3",
        "(lambda: 1)() == 1",
        "[1 for _ in L] == 1",
        "max(key=print) == 1",
        "torch.load('x') == 1",
    ],
)
def test_guards_that_exhaust_or_reach_beyond_sizes_are_refused(
    own: Path, tmp_path: Path, code: str
) -> None:
    bad = with_program(own, tmp_path / "bad.pt2", lambda p: guard(p, code))
    with pytest.raises(CaptureError, match="no condition on sizes"):
        graphopt.capture(bad)


@pytest.mark.parametrize(
    "code",
    [
        "Pow(Pow(Integer(10), Integer(8)), Integer(8))",
        "10**10**10",
        "*".join(f"(s{i} + s{i + 1})" for i in range(40)),
        "Symbol('s0', positive=open('x'))",
        "Float('1e9999999999', precision=53)",
        "Float('1.0', precision=1000000000)",
        "lambdify(s0, s0)",
        "s0.__class__",
        "'s0'",
    ],
)
def test_sizes_that_take_long_or_are_none_are_refused(own: Path, tmp_path: Path, code: str) -> None:
    bad = with_program(own, tmp_path / "bad.pt2", lambda p: size(p, code))
    with pytest.raises(CaptureError, match="no size of numbers and symbols"):
        graphopt.capture(bad)


def test_a_guard_that_divides_by_nothing_is_no_raw_traceback(own: Path, tmp_path: Path) -> None:
    bad = with_program(own, tmp_path / "b.pt2", lambda p: guard(p, "L['x'].size()[0] // 0 == 1"))
    with pytest.raises(CaptureError):
        graphopt.capture(bad)


def test_zip_bombs_are_refused_and_deflated_texts_are_none(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the name of the package's function hides that of the package
    module = sys.modules[check_archive.__module__]
    monkeypatch.setattr(module, "_MOST_INFLATED", 4 << 20)
    deflated = tmp_path / "deflated.pt2"
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members(own).items():
            archive.writestr(f"m/{name}", content)
    check_archive(deflated)
    bomb = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members(own).items():
            archive.writestr(f"m/{name}", content)
        archive.writestr("m/extra/zeros", bytes(5 << 20))
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(CaptureError, match="zip bomb"):
        graphopt.capture(bomb)


def test_members_that_overlap_are_refused(own: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pt2"
    with zipfile.ZipFile(bad, "w") as archive:
        for name, content in members(own).items():
            archive.writestr(f"m/{name}", content)
        archive.writestr("m/extra/long", bytes(100_000))
        long = archive.getinfo("m/extra/long")
        for number in range(100):
            copy = zipfile.ZipInfo(f"m/extra/{number}")
            copy.header_offset, copy.CRC = long.header_offset, long.CRC
            copy.file_size = copy.compress_size = long.file_size
            archive.filelist.append(copy)
            archive.NameToInfo[copy.filename] = copy
    with pytest.raises(CaptureError, match="overlap"):
        graphopt.capture(bad)


class Everything(nn.Module):
    """What real programs hold: control flow, guards on sizes, texts, shifts, keyword inputs."""

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor | None]:
        parts = torch.einsum("bij,bjk->bik", x, x.transpose(1, 2)) * scale
        kept = torch.where((parts > 0) & (parts < 9), parts, parts.new_zeros(()))
        ahead = nn.functional.pad(x, (0, 0, 1, 0), mode="constant")[:, : x.shape[1] // 2]
        chosen = torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))
        return {"kept": nn.functional.gelu(kept, approximate="tanh"), "a": ahead, "c": chosen}


@pytest.mark.slow
def test_what_torch_saves_of_honest_models_is_read(tmp_path: Path) -> None:
    x, scale = torch.randn(2, 6, 4), torch.ones(())
    auto = torch.export.Dim.AUTO
    shapes = {"x": {0: auto, 1: auto}, "scale": None}
    exported = torch.export.export(Everything(), (x,), {"scale": scale}, dynamic_shapes=shapes)
    plain = tmp_path / "plain.pt2"
    torch.export.save(exported, plain)
    check_archive(plain)
    program = graphopt.capture(Everything(), (x,), {"scale": scale})
    path = graphopt.lower(program, "torch").save(tmp_path / "ours.pt2")
    loaded = graphopt.capture(path)
    want, got = Everything()(x, scale=scale), loaded.module()(x, scale=scale)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)


def test_commands_refuse_and_trust(own: Path, tmp_path: Path, runs: Runs) -> None:
    bad = with_program(own, tmp_path / "bad.pt2", lambda p: guard(p, f"{runs.code} is not None"))
    done = command(tmp_path, "inspect", str(bad))
    assert (done.returncode, runs.happened) == (3, False)
    assert "no condition on sizes" in done.stderr
    done = command(tmp_path, "inspect", str(bad), "--trust")
    assert (done.returncode, runs.happened) == (0, True), done.stderr
    runs.marker.unlink()
    done = command(tmp_path, "inspect", str(bad))
    assert (done.returncode, runs.happened) == (3, False), "trust ends with the command"
