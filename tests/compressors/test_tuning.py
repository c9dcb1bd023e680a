"""Tuning of tables, biases and norms against the uncompressed program."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from helpers.tuned_nets import BLOCKS, changed, compressed, example, output_error, outputs

import graphopt
from graphopt.errors import CalibrationError
from graphopt.passes.tune import tune

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.integration
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("kind", "share"), [("mlp", 0.92), ("cnn", 0.85), ("embedding", 0.4)])
def test_error_on_the_data_falls(kind: str, share: float, blocks: Literal["auto", "whole"]) -> None:
    model, data = example(kind)
    program, reference = compressed(model, data[0])
    before = output_error(program, reference, data)
    tuned = tune(program, reference, data, steps=150, blocks=blocks, progress=False)
    assert before > 0.01
    assert output_error(tuned, reference, data) < share * before


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_new_data_gain_as_well(kind: str) -> None:
    model, data = example(kind)
    program, reference = compressed(model, data[0])
    seen = [torch.randn(64, *data[0].shape[1:]) for _ in range(4)]
    new = [torch.randn(64, *data[0].shape[1:])]
    tuned = tune(program, reference, seen, steps=150, progress=False)
    before = output_error(program, reference, new)
    assert output_error(tuned, reference, new) < 0.95 * before


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_tables_biases_and_norms_move_and_codes_and_statistics_stay(
    kind: str, blocks: Literal["auto", "whole"]
) -> None:
    model, data = example(kind)
    before_model = copy.deepcopy(model.state_dict())
    program, reference = compressed(model, data[0])
    before, graph = (
        copy.deepcopy(program.graph_module.state_dict()),
        str(program.graph_module.graph),
    )
    tuned = tune(program, reference, data, steps=20, blocks=blocks, progress=False)
    moved = changed(tuned, program)
    assert {name for name in moved if "indices" in name or "running" in name} == set()
    assert {name for name in before if name.endswith("_lut")} <= moved
    assert any(name.startswith("norm") for name in moved)
    assert any(name.endswith("bias") for name in moved)
    assert str(tuned.graph_module.graph) == graph
    assert type(tuned) is type(program)
    for name, value in program.graph_module.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in model.state_dict().items():
        assert torch.equal(value, before_model[name]), name
    assert tuned.report() == program.report()


def test_tuned_program_shares_no_tensor_with_its_arguments() -> None:
    model, data = example("mlp")
    program, reference = compressed(model, data[0])
    tuned = tune(program, reference, data, steps=3, progress=False)
    given = {
        value.data_ptr()
        for each in (program, reference)
        for value in each.graph_module.state_dict().values()
    }
    state = tuned.graph_module.state_dict()
    assert not [name for name, value in state.items() if value.data_ptr() in given]
    assert not any(value.requires_grad for value in tuned.graph_module.buffers())


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_same_seed_gives_the_same_tables(kind: str) -> None:
    model, data = example(kind)
    program, reference = compressed(model, data[0])
    first, second, other = (
        tune(program, reference, data, steps=30, seed=seed, progress=False) for seed in (3, 3, 4)
    )
    assert changed(first, second) == set()
    assert changed(first, other) != set()


def test_the_callers_random_state_and_gradient_mode_do_not_matter() -> None:
    model, data = example("mlp")
    program, reference = compressed(model, data[0])
    first = tune(program, reference, data, steps=5, progress=False)
    torch.manual_seed(77)
    with torch.no_grad():
        second = tune(program, reference, data, steps=5, progress=False)
    assert changed(first, second) == set()


def test_step_too_long_to_help_is_taken_back() -> None:
    model, data = example("mlp")
    program, reference = compressed(model, data[0])
    tuned = tune(
        program, reference, data, steps=3, learning_rate=1e4, blocks="whole", progress=False
    )
    assert changed(tuned, program) == set()


@pytest.mark.parametrize("options", [{"steps": 0}, {"learning_rate": 0.0, "steps": 3}])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_no_steps_change_nothing(options: dict[str, Any], blocks: Literal["auto", "whole"]) -> None:
    model, data = example("cnn")
    program, reference = compressed(model, data[0])
    tuned = tune(program, reference, data, blocks=blocks, progress=False, **options)
    assert changed(tuned, program) == set()
    for mine, theirs in zip(outputs(tuned, data[0]), outputs(program, data[0]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_uncompressed_program_has_nothing_to_tune() -> None:
    model, data = example("mlp")
    reference = graphopt.capture(model, (data[0],))
    tuned = tune(reference, reference, data, steps=3, progress=False)
    assert changed(tuned, reference) == set()


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_there_must_be_data(kind: str) -> None:
    model, data = example(kind)
    program, reference = compressed(model, data[0])
    with pytest.raises(CalibrationError, match="no data"):
        tune(program, reference, [], progress=False)


@pytest.mark.parametrize("form", ["tuple", "list", "keywords"])
def test_data_come_in_any_form_of_one_call(form: str) -> None:
    wrap = {"tuple": lambda x: (x,), "list": lambda x: [x], "keywords": lambda x: {"x": x}}[form]
    model, data = example("mlp")
    program, reference = compressed(model, data[0])
    plain = tune(program, reference, data, steps=3, progress=False)
    wrapped = tune(program, reference, [wrap(x) for x in data], steps=3, progress=False)
    assert changed(wrapped, plain) == set()
