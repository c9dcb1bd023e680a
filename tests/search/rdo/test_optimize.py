"""The whole pipeline: budgets, what is stored, targets, resuming, reports, refusals."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from search.mixed_precision.nets import encoder, pictures, residual, sentences
from search.rdo.nets import calibration, held_out, trained
from torch import Tensor, nn

import graphopt
from graphopt import rdo
from graphopt.analysis.lookups import find_lookups
from graphopt.analysis.quantized import find_quantized_activations, find_quantized_weights
from graphopt.errors import (
    ArtifactExistsError,
    CompressionError,
    ConfigError,
    InfeasibleError,
    InputError,
    LoweringError,
)
from graphopt.rdo import RDOConfig, Session, optimize

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"draws": 2, "rounding": {"steps": 40}}
EXAMPLE = (calibration()[0][:2],)


def run(config: dict[str, Any], **options: Any) -> rdo.Optimized:
    return optimize(
        trained(), EXAMPLE, calibration(), {**QUICK, **config}, progress=False, **options
    )


@cache
def plain() -> rdo.Optimized:
    return run({"target_bits": 5.0}, evaluate=right, evaluation_data=[held_out()[0]])


def right(model: nn.Module) -> Tensor:
    x, y = held_out()
    return 100.0 * (model(x).argmax(1) == y)


def kl(model: nn.Module) -> float:
    x, _ = held_out()
    with torch.no_grad():
        exact, found = trained()(x).log_softmax(1), model(x).log_softmax(1)
    return float((exact.exp() * (exact - found)).sum(1).mean())


# --- sizes ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", [3.0, 4.19, 6.5])
def test_bits_reported_are_bits_stored_and_within_the_target(target: float) -> None:
    program, report = run(
        {"target_bits": target, "candidates": [2, 3, 4, 6, 8], "rounding": {"blocks": "none"}}
    )
    assert target - 0.6 < report.bits_per_weight <= target
    state = program.exported_program.state_dict | program.exported_program.constants
    weights = [name for name in state if "_quantized" in name or "_scale" in name]
    stored = sum(8 * state[name].numel() * state[name].element_size() for name in weights)
    numel = sum(np.prod(layer.shape) for layer in report.layers)
    assert stored / numel == pytest.approx(report.bits_per_weight)
    assert program.report().bits_per_weight == pytest.approx(report.bits_per_weight)
    assert sum(layer.stored_bits for layer in report.layers) == stored


def test_result_is_closer_than_uniform_quantization_at_its_size() -> None:
    program, report = plain()
    assert report["rate-distortion"].distance < 0.2 * report["uniform 4-bit"].distance
    assert report["rate-distortion"].distance == pytest.approx(kl(program.module()), rel=1e-3)
    assert report["float"].distance == pytest.approx(0, abs=1e-6)
    assert report["uniform 8-bit"].distance < report["uniform 4-bit"].distance
    assert report["rate-distortion"].bits_per_weight <= 5.0


def test_rate_weight_decides_the_bits() -> None:
    sizes = [
        run(
            {"rate_weight": weight, "candidates": [2, 4, 8], "rounding": {"blocks": "none"}}
        ).report.bits_per_weight
        for weight in (1e-9, 1e-6, 1e-3)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 8 > 4 > sizes[-1]


def test_entropy_rate_meets_its_target_in_coded_bits() -> None:
    config = {
        "target_bits": 4.0,
        "candidates": [8],
        "rate": "entropy",
        "rounding": {"blocks": "none"},
    }
    report = run(config).report
    assert 3.6 < report.coded_bits_per_weight < 4.1
    assert report.bits_per_weight > 8  # what targets store
    fixed = run({"target_bits": 5.0, "candidates": [4], "rounding": {"blocks": "none"}}).report
    assert report["rate-distortion"].distance < fixed["rate-distortion"].distance


def test_activations_are_rounded_in_the_result() -> None:
    program, report = run({"target_bits": 5, "activations": "int8"})
    assert len(find_quantized_activations(program.graph_module)) >= 4
    assert report["rate-distortion"].distance < 0.01
    with_weights = find_quantized_weights(program.graph_module)
    assert len(with_weights) == len(report.layers)


def test_palettes_go_through_the_same_stages() -> None:
    program, report = run(
        {
            "target_bits": 4,
            "candidates": [1, 2, 3, 4],
            "family": "palette",
            "rounding": {"blocks": "all", "steps": 60},
        }
    )
    assert report.bits_per_weight <= 4
    assert len(find_lookups(program.graph_module)) == len(report.layers)
    assert report["rate-distortion"].distance < 0.2 * report["uniform 4-bit"].distance
    assert any(layer.how == "adaptive rounding" for layer in report.layers)


def test_integers_and_palettes_compete_for_the_same_bits() -> None:
    config = {
        "target_bits": 5.1,
        "candidates": {
            "whole": "int4",
            "wide": "int8",
            "table": {"palettize": {"n_bits": 4}},
            "kept": None,
        },
    }
    program, report = run(config)
    chosen = {layer.candidate for layer in report.layers}
    assert chosen <= {"whole", "wide", "table", "kept"}
    assert len(chosen) > 1
    assert kl(program.module()) < 0.2 * report["uniform 4-bit"].distance


# --- targets --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("suffix", "mark"),
    [("aimodel", "coreai"), ("mlpackage", "coreml"), ("pte", "executorch"), ("pt2", "")],
)
def test_odd_widths_run_on_every_target(suffix: str, mark: str, tmp_path: Path) -> None:
    if mark:
        pytest.importorskip({"coreai": "coreai_torch", "coreml": "coremltools"}.get(mark, mark))
    program = odd_widths()
    stored = {weight.storage for weight in find_quantized_weights(program.graph_module)}
    assert {"int3", "int6"} <= stored
    target = {"aimodel": "coreai", "mlpackage": "coreml", "pte": "executorch", "pt2": "torch"}
    options = {"precision": "float32"} if mark in ("coreai", "coreml") else {}
    artifact = graphopt.lower(program, target[suffix], **options)
    artifact.save(tmp_path / f"net.{suffix}")
    assert artifact.verify().max_error < 1e-5


@cache
def odd_widths() -> graphopt.CompressedProgram:
    config = {
        "target_bits": 8,
        "layer_candidates": {"stem.weight": ["int6"], "conv1.weight": ["int3"]},
        "rounding": {"blocks": "none"},
    }
    return run(config).program


def test_sizes_of_a_target_count_its_padding() -> None:
    config = {"target_bits": 4.4, "candidates": [3, 4], "rounding": {"blocks": "none"}}
    own = run(config).report
    padded = run({**config, "target_bits": 5.0, "backend": "coreai"}).report
    assert {layer.candidate for layer in padded.layers} == {"int4"}  # 3 bits save nothing there
    assert own.bits_per_weight <= 4.4


def test_candidates_that_a_target_cannot_hold_are_refused() -> None:
    with pytest.raises(LoweringError, match="fp8"):
        run({"target_bits": 8, "candidates": ["fp8_e4m3"], "backend": "coreml"})


# --- other models ---------------------------------------------------------------------------------
def test_embeddings_tied_weights_and_several_outputs() -> None:
    program, report = optimize(
        encoder(),
        (sentences()[0][:2],),
        sentences(),
        {"target_bits": 6, "metric": "mse", **QUICK, "rounding": {"blocks": "all", "steps": 20}},
        progress=False,
    )
    rows = {layer.name: layer for layer in report.layers}
    assert rows["embedding.weight"].how == "rounded"
    assert "no error feedback" in rows["embedding.weight"].note
    assert report.bits_per_weight <= 6
    assert report["rate-distortion"].agreement is None
    with torch.no_grad():
        for found, exact in zip(
            program.module()(sentences()[0]), encoder()(sentences()[0]), strict=True
        ):
            assert float((found - exact).abs().max()) < 0.2 * float(exact.abs().max())


def test_blocks_two_values_wide_go_through_a_unet() -> None:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
            self.c, self.d = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(12, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            y = self.b(x).relu()
            y = self.c(y).relu()
            return self.d(torch.cat([x, y], 1))

    torch.manual_seed(0)
    model = UNet().eval()
    data = pictures(4)
    counts, found = [], []
    for width in (1, 2):
        config = {
            "target_bits": 6,
            "metric": "mse",
            "blocks": {"width": width},
            **QUICK,
            "rounding": {"blocks": "all", "steps": 30},
        }
        session = Session.open(
            model, (data[0][:2],), data, RDOConfig.from_dict(config), progress=False
        )
        counts.append(len(session.blocks))
        found.append(optimize(model, (data[0][:2],), data, config, progress=False).report)
    assert counts[0] < counts[1]
    for report in found:
        assert report["rate-distortion"].distance < report["uniform 4-bit"].distance


def test_grouped_convolutions_and_unfolded_norms() -> None:
    data = pictures(4)
    for fold in (True, False):
        _, report = optimize(
            residual(),
            (data[0][:2],),
            data,
            {"target_bits": 5, "metric": "mse", "fold_batchnorm": fold, **QUICK},
            progress=False,
        )
        rows = {layer.name: layer for layer in report.layers}
        assert rows["conv1.weight"].how in ("error feedback", "adaptive rounding")
        assert report["rate-distortion"].distance < 0.5 * report["uniform 4-bit"].distance


def test_outputs_that_are_no_floats_are_left_out_of_the_loss() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(trained())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.net(x)
            return logits, logits.argmax(1)

    config = {"target_bits": 5.0, **QUICK, "rounding": {"blocks": "all", "steps": 5}}
    program, report = optimize(Labelled().eval(), EXAMPLE, calibration(), config, progress=False)
    x, _ = held_out()
    logits, labels = program.module()(x)
    assert torch.equal(logits.argmax(1), labels)
    assert report["rate-distortion"].distance < 0.2 * report["uniform 4-bit"].distance


def test_keyword_inputs_and_exported_programs() -> None:
    data = pictures(2)
    exported = torch.export.export(residual(), (data[0],), strict=False)
    config = {"target_bits": 6, **QUICK, "metric": "mse"}
    by_name = optimize(exported, None, [{"x": x} for x in data], config, progress=False)
    by_place = optimize(exported, None, data, config, progress=False)
    assert by_name.report.bits() == by_place.report.bits()


# --- the session's stages -------------------------------------------------------------------------
def test_stages_alone_give_what_the_whole_gives() -> None:
    config = RDOConfig.from_dict({"target_bits": 5.0, **QUICK})
    session = Session.open(trained(), EXAMPLE, calibration(), config, progress=False)
    table = session.sensitivities(progress=False)
    losses = {
        layer.name: dict(zip(layer.candidates, own, strict=True))
        for layer, own in zip(session.layers, table.losses(), strict=True)
    }
    bits = {
        layer.name: dict(zip(layer.candidates, map(float, layer.bits), strict=True))
        for layer in session.layers
    }
    budget = 5.0 * session.weights
    first = rdo.allocate(losses, bits, budget=budget, rate_weight=None)
    costs = session.search(first.rate_weight, progress=False)
    final = rdo.allocate(costs.losses, costs.bits, budget=budget, rate_weight=None)
    sensitive = session.sensitive_blocks(final.choice, costs.losses)
    fits = session.fit(final.choice, rounded=sensitive, progress=False)
    found = session.program(fits).module().state_dict()
    expected = plain().program.module().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_costs_fall_with_bits_and_the_choice_minimises_loss_and_rate() -> None:
    config = RDOConfig.from_dict(
        {"rate_weight": 1e-6, "candidates": [2, 4, 8], "blocks": {"rounds": 1}, "draws": 4}
    )
    session = Session.open(trained(), EXAMPLE, calibration(), config, progress=False)
    costs = session.search(1e-6, progress=False)
    for name, own in costs.losses.items():
        assert own["int2"] > own["int4"] > own["int8"] > 0
        best = min(own, key=lambda each: own[each] + 1e-6 * costs.bits[name][each])
        assert costs.choice[name] == best


def test_predicted_loss_is_about_that_of_the_program() -> None:
    """Losses of single layers add up to the divergence of the whole network."""
    config = RDOConfig.from_dict({"target_bits": 3.3, "candidates": [3], "draws": 8})
    session = Session.open(trained(), EXAMPLE, calibration(), config, progress=False)
    costs = session.search(0.0, progress=False)
    fits = session.fit(dict.fromkeys(costs.losses, "int3"), progress=False)
    module = session.program(fits).module()
    x = torch.cat(calibration())
    with torch.no_grad():
        exact, found = trained()(x).log_softmax(1), module(x).log_softmax(1)
    measured = float((exact.exp() * (exact - found)).sum(1).mean())
    predicted = sum(own["int3"] for own in costs.losses.values())
    assert 0.2 < predicted / measured < 5


@pytest.mark.parametrize(("blocks", "count"), [("all", 3), ("none", 0), ("sensitive", 1)])
def test_sensitive_blocks_hold_their_share_of_the_loss(blocks: str, count: int) -> None:
    config = RDOConfig.from_dict(
        {"target_bits": 5.0, "rounding": {"blocks": blocks, "share": 0.6}, "draws": 1}
    )
    session = Session.open(trained(), EXAMPLE, calibration(), config, progress=False)
    losses = {layer.name: {"int4": 0.01} for layer in session.layers}
    losses["conv1.weight"]["int4"] = 1.0
    chosen = session.sensitive_blocks(dict.fromkeys(losses, "int4"), losses)
    assert len(chosen) >= count if blocks == "all" else len(chosen) == count
    if blocks == "sensitive":
        assert "conv1.weight" in session.blocks[chosen[0]]


def test_a_choice_that_is_no_candidate_is_refused() -> None:
    config = RDOConfig.from_dict({"target_bits": 5.0, "draws": 1})
    session = Session.open(trained(), EXAMPLE, calibration(), config, progress=False)
    with pytest.raises(ConfigError, match=r"choice\['stem.weight'\]: 'int5' is none of"):
        session.fit({"stem.weight": "int5"})


# --- reports, files, resuming ---------------------------------------------------------------------
def test_scores_are_compared_sample_by_sample() -> None:
    report = plain().report
    base = right(trained()).double()
    ours = right(plain().program.module()).double()
    row = report["rate-distortion"]
    assert row.score == pytest.approx(float(ours.mean()))
    assert row.drop == pytest.approx(float((base - ours).mean()))
    assert row.error == pytest.approx(float((base - ours).std()) / len(base) ** 0.5)
    single = run({"target_bits": 6, "rounding": {"blocks": "none"}}, evaluate=lambda _: 3.0).report
    assert single["float"].score == 3.0
    assert single["float"].error is None


def test_scores_of_different_length_are_refused() -> None:
    lengths = iter([3, 4, 4, 4])
    with pytest.raises(InputError, match="scores of shape"):
        run(
            {"target_bits": 6, "rounding": {"blocks": "none"}},
            evaluate=lambda _: torch.zeros(next(lengths)),
        )


def test_model_is_not_changed_and_results_repeat() -> None:
    model = copy.deepcopy(trained())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = {"target_bits": 5.0, **QUICK}
    programs = [
        optimize(model, EXAMPLE, calibration(), config, progress=False).program for _ in range(2)
    ]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    first, second = (program.module().state_dict() for program in programs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_folder_holds_report_config_bits_picture_and_program(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "results"
    program, report = run({"target_bits": 5.0}, out=out)
    assert sorted(path.name for path in out.iterdir()) == [
        "bits.json",
        "comparison.png",
        "config.yaml",
        "quantized.pt2",
        "report.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    written = json.loads((out / "report.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    assert written["created"][:4].isdigit()
    assert RDOConfig.from_yaml(out / "config.yaml") == RDOConfig.from_dict(
        {**QUICK, "target_bits": 5.0}
    )
    bits = json.loads((out / "bits.json").read_text())
    assert {name: each["candidate"] for name, each in bits.items()} == {
        layer.name: layer.candidate for layer in report.layers
    }
    x, _ = held_out()
    loaded = torch.export.load(out / "quantized.pt2").module()
    torch.testing.assert_close(loaded(x), program.module()(x))
    with pytest.raises(ArtifactExistsError, match="overwrite=True"):
        run({"target_bits": 5.0}, out=out)
    again = run({"target_bits": 5.0}, out=out, overwrite=True).report
    assert again.bits() == report.bits()


class Stopped(KeyboardInterrupt):
    pass


def test_interrupted_run_goes_on_at_the_last_finished_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from graphopt.rdo import session as module

    calls: list[int] = []
    fit_block = Session._fit_block

    def counted(self: Session, walk: Any, site: Any, *rest: Any) -> Any:
        if len(calls) == 2:
            raise Stopped
        calls.append(site.number)
        return fit_block(self, walk, site, *rest)

    out = tmp_path / "results"
    config = {"target_bits": 5.0, "rounding": {"blocks": "all", "steps": 20}, "activations": "int8"}
    whole = run(config)
    with monkeypatch.context() as patch:
        patch.setattr(module.Session, "_fit_block", counted)
        with pytest.raises(Stopped):
            run(config, out=out)
    assert not out.exists()
    partial = tmp_path / ".results.partial"
    assert sorted(path.name for path in partial.iterdir()) == [
        "block0.pt",
        "block1.pt",
        "key",
        "search.json",
        "sensitivities.jsonl",
    ]
    with pytest.raises(InputError, match=r"unfinished run of another model, other data"):
        run({**config, "seed": 1}, out=out)
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(module, "search_block", None)  # known already
        patch.setattr(
            module.Session,
            "_fit_block",
            lambda self, walk, site, *rest: (
                calls.append(site.number),
                fit_block(self, walk, site, *rest),
            )[1],
        )
        program, _ = run(config, out=out)
    assert calls == list(range(2, 2 + len(calls)))
    assert not partial.exists()
    found, expected = program.module().state_dict(), whole.program.module().state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["integer", "palette"])
def test_finished_blocks_survive_being_stored(family: str, tmp_path: Path) -> None:
    from graphopt.search.rdo.state import RunState

    config = RDOConfig.from_dict(
        {
            "target_bits": 8,
            "candidates": {"a": 4, "kept": None},
            "family": family,
            "draws": 1,
            "rounding": {"blocks": "all", "steps": 3},
        }
    )
    session = Session.open(trained(), EXAMPLE, calibration(64), config, progress=False)
    choice = {layer.name: "a" for layer in session.layers} | {"head.weight": "kept"}
    state = RunState(tmp_path / "state", "key", resume=True)
    fits = session.fit(choice, rounded=[0], save=state.add_block, progress=False)
    known = RunState(tmp_path / "state", "key", resume=True).blocks()
    assert known.keys() == {fit.number for fit in fits}
    again = session.fit(choice, known=known, progress=False)
    first, second = (session.program(each).module().state_dict() for each in (fits, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert known[0].rounded is not None
    assert known[0].rounded.before == fits[0].rounded.before  # type: ignore[union-attr]


def test_report_prints_and_draws() -> None:
    pytest.importorskip("matplotlib")
    report = plain().report
    text = str(report)
    assert "rate-distortion" in text
    assert "conv2.weight" in text
    assert len(rdo.draw_comparison(report).axes) == 4
    unscored = run({"target_bits": 6, "rounding": {"blocks": "none"}}).report
    assert len(rdo.draw_comparison(unscored).axes) == 3


# --- refusals -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "target_bits or rate_weight"),
        ({"target_bits": 4, "rate_weight": 1.0}, "and not both"),
        ({"target_bits": 4, "rouding": {}}, r"RDOConfig.rouding: unknown key"),
        ({"target_bits": 4, "rounding": {"steps": 0}}, "rounding.steps"),
        ({"target_bits": 4, "candidates": ["int5000"]}, "not understood"),
        ({"target_bits": 4, "candidates": ["int8 a8"]}, "set `activations` for all layers"),
        ({"target_bits": 5.0, "layer_candidates": {"nowhere": [4]}}, "matches no layer"),
    ],
)
def test_wrong_configs_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        optimize(trained(), EXAMPLE, calibration(32), config, progress=False)


def test_targets_out_of_reach_are_refused_with_the_range() -> None:
    with pytest.raises(InfeasibleError, match=r"attainable are 4\.58\d to 8\.58\d bits per weight"):
        run({"target_bits": 3})


def test_missing_data_and_broken_weights_are_refused() -> None:
    with pytest.raises(InputError, match="no calibration data"):
        optimize(trained(), EXAMPLE, [], {"target_bits": 4}, progress=False)
    broken = copy.deepcopy(trained())
    broken.head.weight.data[0, 0] = float("nan")
    with pytest.raises(CompressionError, match="head.weight"):
        optimize(broken, EXAMPLE, calibration(64), {"target_bits": 4, **QUICK}, progress=False)


def test_config_survives_yaml(tmp_path: Path) -> None:
    config = RDOConfig.from_dict(
        {
            "target_bits": 3.5,
            "candidates": {"four": 4, "table": {"palettize": {"n_bits": 2}}},
            "activations": "int8",
            "rounding": {"beta": [10, 3]},
            "blocks": {"width": 2},
        }
    )
    path = tmp_path / "rdo.yaml"
    path.write_text(config.to_yaml())
    assert RDOConfig.from_yaml(path) == config
    named, _ = config.all_candidates()
    assert [each.name for each in named] == ["four", "table"]
