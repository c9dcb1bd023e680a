from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pools import Immediate, processes, threads
from search.mixed_precision.nets import encoder as make_encoder
from search.mixed_precision.nets import pictures, residual, sentences

import graphopt
from graphopt.errors import (
    ArtifactExistsError,
    ConfigError,
    InfeasibleError,
    InputError,
    StateError,
)
from graphopt.mixed_precision import METRICS, Recipe, SensitivityTable, analyze
from graphopt.search.mixed_precision.accuracy_drop import drop_and_error
from graphopt.search.mixed_precision.choose import every_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def table() -> SensitivityTable:
    x = pictures()
    return analyze(residual(), (x[0],), [2, 4, 6], x, ["psnr", "kl"])


def test_the_greedy_walk_is_the_published_one(table: SensitivityTable) -> None:
    values = table.values()
    pairs = sorted(
        (
            (values[layer.name][name], layer, name)
            for layer in table.layers
            for name in layer.candidates
        ),
        key=lambda pair: -pair[0],
    )
    for target in (3.0, 4.0, 5.0, 7.0):
        choice = {layer.name: "keep" for layer in table.layers}
        for _, layer, name in pairs:
            if (
                sum(each.bits_of(choice[each.name]) for each in table.layers)
                <= target * table.weights
            ):
                break
            choice[layer.name] = name
        found = table.recipe(target_bpw=target, solver="greedy")
        assert found.choice == choice
        assert found.bits_per_weight <= target
        assert found.bound is not None
        assert found.bound <= found.loss


@pytest.mark.parametrize("solver", ["milp", "lagrangian"])
@pytest.mark.parametrize("target", [2.5, 3.5, 5.0, 16.0])
def test_recipes_meet_their_target_and_say_how_good_they_are(
    table: SensitivityTable, solver: Any, target: float
) -> None:
    recipe = table.recipe(target_bpw=target, solver=solver)
    assert recipe.bits_per_weight <= target
    bits = sum(layer.bits_of(recipe.choice[layer.name]) for layer in table.layers)
    assert recipe.bits == bits
    assert recipe.bytes == math.ceil((bits + table.header.rest_bits) / 8)
    assert recipe.loss == pytest.approx(table.predict(recipe.choice))
    assert recipe.value == pytest.approx(METRICS["psnr"].value(recipe.loss))
    assert recipe.bound is not None
    assert recipe.bound <= recipe.loss * (1 + 1e-9)
    assert recipe.gap is not None
    assert (recipe.gap < 1e-3) or solver == "lagrangian"
    assert "bits per weight" in str(recipe)
    assert sum(count for count, _ in recipe.distribution.values()) == 5


def test_more_bits_never_predict_more_loss(table: SensitivityTable) -> None:
    losses = [table.recipe(target_bpw=bpw).loss for bpw in (2.5, 3, 4, 5, 6, 8)]
    assert losses == sorted(losses, reverse=True)
    front = every_recipe(table)
    assert [each.bits for each in front] == sorted(each.bits for each in front)
    assert front[-1].loss == 0  # all kept


def test_byte_targets_hold_for_the_whole_program(table: SensitivityTable) -> None:
    recipe = table.recipe(target_bytes=1500)
    assert recipe.bytes <= 1500
    model = residual()
    rest = sum(
        (2 if tensor.is_floating_point() else 8) * tensor.numel()
        for name, tensor in model.state_dict().items()
        if name not in recipe.choice
    )
    assert 8 * rest - recipe.rest_bits in (0, 8 * 16)  # counters that no op reads are not captured


def test_loss_targets_give_the_smallest_recipe(table: SensitivityTable) -> None:
    known = table.recipe(target_bpw=4)
    found = table.recipe(max_loss=known.loss)
    assert found.loss <= known.loss * (1 + 1e-9)
    assert found.bits <= known.bits
    with pytest.raises(InfeasibleError, match="max_loss"):
        table.recipe(max_loss=table.recipe(target_bpw=16, keep=False).loss / 2, keep=False)


def test_unattainable_targets_name_the_range(table: SensitivityTable) -> None:
    with pytest.raises(
        InfeasibleError, match=r"1\.500 bits per weight were asked, 2\.\d+ to 16\.\d+"
    ):
        table.recipe(target_bpw=1.5)
    with pytest.raises(InfeasibleError, match="are attainable"):
        table.recipe(target_bytes=10)
    with pytest.raises(InfeasibleError, match="greedy walk"):
        table.recipe(target_bpw=1.5, solver="greedy")


def test_targets_exclude_each_other(table: SensitivityTable) -> None:
    for given in ({}, {"target_bpw": 4, "max_loss": 1.0}, {"max_drop": 0.1}):
        with pytest.raises(InputError):
            table.recipe(**given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="solver"):
        table.recipe(target_bpw=4, solver="best")  # type: ignore[arg-type]


def test_pins_hold(table: SensitivityTable) -> None:
    pin = {"head.*": "2-bit", "stem.weight": "keep"}
    for solver in ("milp", "lagrangian", "greedy"):
        recipe = table.recipe(target_bpw=5, pin=pin, solver=solver)  # type: ignore[arg-type]
        assert recipe.choice["head.weight"] == "2-bit"
        assert recipe.choice["stem.weight"] == "keep"
    with pytest.raises(ConfigError, match="closest: head"):
        table.recipe(target_bpw=4, pin={"heed.weight": "2-bit"})
    with pytest.raises(ConfigError, match="not a valid regular expression"):
        table.recipe(target_bpw=4, pin={"head(": "2-bit"})
    with pytest.raises(ConfigError, match="no candidate '3-bit'"):
        table.recipe(target_bpw=4, pin={"head.weight": "3-bit"})


def test_layers_need_not_stay_uncompressed(table: SensitivityTable) -> None:
    assert "keep" in table.recipe(target_bpw=12).choice.values()
    assert "keep" not in table.recipe(target_bpw=12, keep=False).choice.values()


def test_recipes_survive_their_file(table: SensitivityTable, tmp_path: Path) -> None:
    recipe = table.recipe(target_bpw=4)
    path = recipe.save(tmp_path / "recipe.yaml")
    loaded = Recipe.load(path)
    assert loaded.to_config() == recipe.to_config()
    for name in ("choice", "bits", "bytes", "loss", "bound", "gap", "fingerprint", "value"):
        assert getattr(loaded, name) == getattr(recipe, name)
    with pytest.raises(ArtifactExistsError):
        recipe.save(path)
    assert list(tmp_path.iterdir()) == [path]
    for text in ("a: 1\n", "recipe: {}\nlayers: {x: {}}\n"):
        path.write_text(text)
        with pytest.raises(InputError, match="not a recipe"):
            Recipe.load(path)


def test_the_compressed_program_is_what_the_recipe_says(table: SensitivityTable) -> None:
    x = pictures()
    recipe = table.recipe(target_bpw=4)
    program = graphopt.compress(residual(), (x[0],), recipe.to_config(), correct_statistics=False)
    for layer in table.layers:
        row = program.report()[layer.name]
        wanted = recipe.choice[layer.name]
        assert (row.n_bits, row.status) == (
            (int(wanted[0]), "palettized") if wanted != "keep" else (None, "skipped")
        )
    fitted = recipe.to_config(algorithm="gptq")
    assert '"gptq"' in fitted.to_json()
    module = table.apply(recipe, x, algorithm="gptq")
    assert module(x[0]).shape == (8, 5)


def test_a_recipe_is_bound_to_its_graph(table: SensitivityTable) -> None:
    recipe = table.recipe(target_bpw=4)
    recipe.check(table.program)
    ids = sentences()
    other = analyze(make_encoder(), (ids[0],), [2], ids)
    with pytest.raises(InputError, match="another graph"):
        other.apply(recipe)


def test_sizes_of_the_article_fill_the_printed_column() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 7, bias=False)).eval()
    x = torch.randn(1, 3, 9, 9)
    found = analyze(model, (x,), [2, 4, 6], [x], lut_dtype="float32")
    for size in ("2.31", "4.66", "7.14"):
        assert size in str(found)
    assert "peak: the reference's largest magnitude" in " ".join(str(found).split())


# --- refinement, floors, sweeps -------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["exact", "hybrid"])
@pytest.mark.parametrize("correction", [None, "statistics"])
def test_refinement_is_never_worse_nor_larger(mode: Any, correction: Any) -> None:
    from graphopt.search.mixed_precision.refinement import recipe_evaluator

    model, x = residual(), pictures()
    table = analyze(model, (x[0],), [2, 3, 4, 6], x, "mse", mode=mode, correction=correction)
    evaluator = recipe_evaluator(table, x)
    for target in (2.6, 3.5):
        for solver in ("greedy", "milp"):
            first = table.recipe(target_bpw=target, solver=solver)  # type: ignore[arg-type]
            refined = table.refine(first, x, evaluations=8)
            before = evaluator.measure([first.choice[layer.name] for layer in table.layers])
            after = evaluator.measure([refined.choice[layer.name] for layer in table.layers])
            assert refined.measured == pytest.approx(after)
            assert after <= before
            assert refined.bits_per_weight <= target
            assert "refined" in refined.solver


def test_refinement_measures_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.search.mixed_precision import recipe_evaluation

    calls = 0
    original = recipe_evaluation.RecipeEvaluator._measured

    def counted(self: Any, names: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return original(self, names)

    monkeypatch.setattr(recipe_evaluation.RecipeEvaluator, "_measured", counted)
    model, x = residual(), pictures()
    table = analyze(model, (x[0],), [2, 3, 4, 6], x, "mse", mode="hybrid")
    first = table.recipe(target_bpw=3)
    for allowed in (1, 2, 5, 9):
        calls = 0
        table.refine(first, x, evaluations=allowed)
        assert 1 <= calls <= allowed


def test_refinement_keeps_pins() -> None:
    model, x = residual(), pictures()
    table = analyze(model, (x[0],), [2, 4, 6], x, mode="hybrid")
    pin = {"stem.weight": "2-bit"}
    refined = table.refine(table.recipe(target_bpw=4, pin=pin), x, pin=pin)
    assert refined.choice["stem.weight"] == "2-bit"


def test_paired_errors_are_those_of_changed_answers() -> None:
    before = torch.tensor([1.0] * 90 + [0.0] * 10)
    after = before.clone()
    after[:5] = 0  # five lost
    after[95:98] = 1  # three won
    drop, error = drop_and_error(before, after)
    assert drop == pytest.approx(0.02)
    assert error == pytest.approx(math.sqrt(8) / 100, rel=0.02)
    assert drop_and_error(0.9, 0.85) == (pytest.approx(0.05), 0.0)


def test_a_floor_is_kept_by_real_evaluations(table: SensitivityTable) -> None:
    x = pictures()
    exact = residual()

    def score(module: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            found = torch.cat([module(each) for each in x])
            wanted = torch.cat([exact(each) for each in x])
        return -(found - wanted).square().sum(1)

    recipe = table.recipe(max_drop=0.01, evaluate=score)
    drop, error = drop_and_error(score(exact), score(table.apply(recipe)))
    assert drop + 1.645 * error <= 0.01
    front = every_recipe(table)
    place = [each.bits for each in front].index(recipe.bits)
    drop, error = drop_and_error(score(exact), score(table.apply(front[place - 1])))
    assert drop + 1.645 * error > 0.01  # the next smaller one is not good enough
    with pytest.raises(InfeasibleError, match="even the largest"):
        table.recipe(max_drop=-1.0, evaluate=score)


def first_output(module: torch.nn.Module) -> float:
    with torch.no_grad():
        return float(module(pictures()[0]).double().sum())


@pytest.mark.parametrize(
    "pool", [threads, Immediate, pytest.param(processes, marks=pytest.mark.slow)]
)
def test_sweeps_do_not_depend_on_the_executor(
    table: SensitivityTable, pool: Callable[[], Executor]
) -> None:
    here = table.sweep([3.0, 4.0], first_output, progress=False)
    with pool() as executor:
        there = table.sweep([3.0, 4.0], first_output, executor=executor, progress=False)
        assert there.points == here.points
        if pool is not threads:
            with pytest.raises(InputError, match="cannot be sent to a"):
                table.sweep([3.0], lambda module: 0.0, executor=executor, progress=False)


def test_sweeps_trace_a_curve_and_go_on_after_an_interruption(
    table: SensitivityTable, tmp_path: Path
) -> None:
    x = pictures()
    log, going_on = tmp_path / "calls", tmp_path / "go on"

    def score(module: torch.nn.Module) -> float:
        # what it counts is no part of what it computes, and so stands in a file
        with log.open("a") as file:
            if file.tell() == 2 and not going_on.exists():
                raise KeyboardInterrupt
            file.write("x")
        with torch.no_grad():
            return METRICS["psnr"].compare(module(x[0]), residual()(x[0]))

    path = tmp_path / "sweep.jsonl"
    with pytest.raises(KeyboardInterrupt):
        table.sweep([1.0, 3, 4, 5], score, path=path)
    going_on.touch()
    curve = table.sweep([1.0, 3, 4, 5], score, path=path)
    assert log.stat().st_size == 3 + 3 + 1  # nothing twice
    assert curve.failed == (1.0,)
    assert [point.target for point in curve.of_kind("recipe")] == [3, 4, 5]
    assert [point.label for point in curve.of_kind("uniform")] == ["2-bit", "4-bit", "6-bit"]
    assert curve.of_kind("uncompressed")[0].score == math.inf
    scores = [point.score for point in curve.of_kind("recipe")]
    assert scores == sorted(scores)
    assert "knee" in str(curve)
    axes = curve.plot()
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    solver = curve.of_kind("recipe")[0].label
    assert {f"mixed precision, {solver}", "uniform"} <= labels
    assert (curve.to_csv(tmp_path / "sweep.csv").read_text().count("\n")) == 1 + 3 + 3 + 1
    with pytest.raises(InfeasibleError, match="none of the targets"):
        table.sweep([1.0], score)
    path.write_text("no sweep\n")
    with pytest.raises(InputError, match="not a sweep"):
        table.sweep([3.0], score, path=path)
    assert path.read_text() == "no sweep\n"


def test_a_table_without_its_model_says_so(table: SensitivityTable, tmp_path: Path) -> None:
    x = pictures()
    path = tmp_path / "table.jsonl"
    analyze(residual(), (x[0],), [2, 4], x, path=path)
    loaded = SensitivityTable.load(path)
    recipe = loaded.recipe(target_bpw=3)
    with pytest.raises(StateError, match="no model"):
        loaded.refine(recipe, x)
    assert SensitivityTable.load(path, residual(), (x[0],)).refine(recipe, x).bits_per_weight <= 3
