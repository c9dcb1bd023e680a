"""Models that keep state, or take inputs of any size: forms × targets, step by step; `OUT` has the table."""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.palettized_nets import uniform
from helpers.state_nets import OPEN, STATEFUL
from helpers.tiers import cases
from torch import Tensor, nn

import graphopt
from graphopt.analysis.open_dims import open_dims
from graphopt.errors import GraphOptError, LoweringError
from graphopt.inspection import ModelInspector, inspect_program
from graphopt.ir.program import Program
from graphopt.palettization import PalettizationSpec
from graphopt.quantization import (
    ModuleQuantizerConfig,
    QuantizationSpec,
    QuantizerConfig,
)
from graphopt.quantization.spec import PerBlockGranularity

TARGETS = ["coreai", "coreml", "executorch", "torch", "onnx"]
_BLOCKS = QuantizationSpec(dtype="int4", granularity=PerBlockGranularity(axis=1, block_size=8))
FORMS: dict[str, Any] = {
    "float": None,
    "4-bit tables": uniform(PalettizationSpec(n_bits=4)),
    "W8A8": QuantizerConfig(),
    "int4 blocks": QuantizerConfig(
        global_config=ModuleQuantizerConfig(
            op_state_spec={"weight": _BLOCKS}, op_input_spec=None, op_output_spec=None
        )
    ),
}
MODELS = [*STATEFUL, *OPEN]


def lowered(program: Program, target: str, **options: Any) -> Any:
    given = {"precision": "float32"} if target == "coreml" else {}
    return graphopt.lower(program, target, **given, **options)


@functools.cache
def made(name: str, form: str) -> Program:
    config = FORMS[form]
    if name in STATEFUL:
        case = STATEFUL[name]
        program = graphopt.capture(case.model(), case.calls[0], dynamic_shapes=case.shapes)
        example, data = case.calls[0], [graphopt.CallSequence(case.calls)]
    else:
        build, example, _ = OPEN[name]
        torch.manual_seed(0)
        program, data = graphopt.capture(build().eval(), example), [example]
    if config is None:
        return program
    return graphopt.compress(program, example, config, calibration_data=data)


def folder_of(root: Path, name: str, form: str) -> Path:
    folder = root / f"{name} {form}"
    folder.mkdir(exist_ok=True)
    return folder


def outcome(name: str, form: str, target: str, folder: Path) -> tuple[str, str]:
    """What became of a cell ("right", "refused" or "wrong"), and its error or the reason."""
    try:
        if name in STATEFUL:
            artifact = lowered(made(name, form), target)
            calls: Any = [graphopt.CallSequence(STATEFUL[name].calls)]
        else:
            artifact, calls = lowered(made(name, form), target, shapes=OPEN[name][2]), True
        artifact.save(folder / f"m{artifact.suffix}", verify=calls, overwrite=True)
    except LoweringError as error:
        return "refused", str(error)
    except GraphOptError as error:
        return "wrong", str(error)
    found = artifact.verification
    return "right", f"{found.max_error:.1g}"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "target"),
    cases(
        ["index_copy cache", "counters"],
        TARGETS,
        default=lambda name, target: name == "counters",
    ),
)
def test_state_is_kept_from_call_to_call(name: str, target: str, tmp_path: Path) -> None:
    case = STATEFUL[name]
    artifact = lowered(made(name, "float"), target)
    path = artifact.save(tmp_path / f"m{artifact.suffix}")
    assert path.exists()
    found = artifact.verify(calls=case.calls)
    assert found.holds
    assert found.calls == len(case.calls)
    assert found.max_error < 1e-3
    again = artifact.verify(calls=case.calls)  # from the beginning
    assert again.max_error == found.max_error
    names = [each.name for each in artifact.state]
    assert len(found.state) == (0 if target == "executorch" else len(names))


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "target"),
    cases(list(OPEN), TARGETS, default=lambda name, target: name == "picture"),
)
def test_open_sizes_are_compared_at_their_bounds(name: str, target: str, tmp_path: Path) -> None:
    _, example, shapes = OPEN[name]
    before = open_dims(made(name, "float"))
    artifact = lowered(made(name, "float"), target, shapes=shapes)
    artifact.save(tmp_path / f"m{artifact.suffix}")
    found = artifact.verification
    assert found.calls >= 4  # the example, both bounds and one between
    assert open_dims(made(name, "float")) == before
    assert found.max_error < 1e-3
    smaller = tuple(leaf[..., :8] if leaf.dim() > 2 else leaf[:, :3] for leaf in example)
    if name != "picture":
        assert artifact.verify(*smaller).holds


@pytest.mark.coreml
@pytest.mark.integration
def test_core_ml_takes_a_list_of_shapes(tmp_path: Path) -> None:
    sizes = [(2, 3, 32, 32), (2, 3, 24, 40)]
    artifact = lowered(made("picture", "float"), "coreml", shapes={"image": sizes})
    artifact.save(tmp_path / "m.mlpackage")
    assert artifact.verification.calls == 3
    spec = artifact.model.get_spec().description.input[0].type.multiArrayType
    listed = {tuple(each.shape) for each in spec.enumeratedShapes.shapes}
    assert listed == set(sizes)


def test_what_cannot_be_open_is_refused_before_anything_is_made() -> None:
    program = made("encoder", "float")
    with pytest.raises(LoweringError, match="has no bound"):
        graphopt.lower(program, "executorch", shapes="open")
    with pytest.raises(LoweringError, match="no input"):
        graphopt.lower(program, "torch", shapes={"tokens": {1: (1, 4)}})
    fixed = graphopt.capture(nn.Linear(4, 4).eval(), (torch.zeros(2, 4),), dynamic_shapes=None)
    with pytest.raises(LoweringError, match="fixed sizes"):
        graphopt.lower(fixed, "torch", shapes="open")
    with pytest.raises(LoweringError, match=r"input\[1\] is fixed"):
        graphopt.lower(fixed, "torch", shapes={"input": {1: (1, 4)}})


def test_programs_know_their_state_and_their_open_sizes() -> None:
    program = made("counters", "float")
    shown = {each.name: str(each) for each in program.state}
    assert shown["calls"] == "calls: int64[], starts as 70000"
    assert shown["mean"] == "mean: float32[32], starts as 1"
    assert shown["seen"] == "seen: bool[2], starts from stored values"
    assert inspect_program(program).state == tuple(shown.values())
    assert "state mean: float32[32]" in ModelInspector(program).format_summary()
    dims = open_dims(made("encoder", "float"))
    assert [(dim.place, dim.example) for dim in dims] == [("ids[0]", 1), ("ids[1]", 12)]


class FirstRead(nn.Module):
    """Multiplies by a buffer that it then replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.register_buffer("memory", torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.memory
        self.memory.copy_(self.memory * 0.5)
        return self.fc(y)


def test_state_is_no_weight() -> None:
    x = torch.randn(2, 16)
    program = graphopt.compress(FirstRead().eval(), (x,), FORMS["4-bit tables"])
    assert [row.name for row in program.report() if row.status != "skipped"] == ["fc.weight"]


@pytest.mark.coreml
def test_core_ml_refuses_state_before_ios_18() -> None:
    with pytest.raises(LoweringError, match="state for iOS17; raise minimum_deployment_target"):
        graphopt.lower(made("GRU", "float"), "coreml", minimum_deployment_target="iOS17")


COMPRESSED = [form for form in FORMS if form != "float"]


def cells(name: str) -> dict[tuple[str, str], tuple[str, str]]:
    """What became of a model: (form, target) → as `outcome` says. `OUT/state.md` has those so far."""
    found = {}
    for form, target in itertools.product(COMPRESSED, TARGETS):
        with tempfile.TemporaryDirectory() as folder:
            found[form, target] = outcome(name, form, target, folder_of(Path(folder), name, form))
    made.cache_clear()
    rows = [[name, form, *_shown(found, form)] for form in COMPRESSED]
    parts = Path(os.environ.get("OUT", "out")) / "state"
    parts.mkdir(parents=True, exist_ok=True)
    part = parts / f"{MODELS.index(name):02}.md"
    part.write_text("".join(f"| {' | '.join(row)} |\n" for row in rows), encoding="utf-8")
    head = f"| model | form | {' | '.join(TARGETS)} |\n|{'---|' * (len(TARGETS) + 2)}\n"
    table = head + "".join(each.read_text(encoding="utf-8") for each in sorted(parts.glob("*.md")))
    parts.with_suffix(".md").write_text(table, encoding="utf-8")
    return found


def _shown(found: dict[tuple[str, str], tuple[str, str]], form: str) -> list[str]:
    row = [found[form, target] for target in TARGETS]
    return [detail if kind == "right" else kind for kind, detail in row]


@pytest.mark.slow
@pytest.mark.coreai
@pytest.mark.coreml
@pytest.mark.executorch
@pytest.mark.parametrize("name", MODELS)
def test_every_cell_of_a_model_is_right(name: str) -> None:
    others = {cell: said for cell, (kind, *said) in cells(name).items() if kind != "right"}
    assert others == {}
