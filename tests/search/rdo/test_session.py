"""Folders of a run: what they hold, resuming, reports, refused configs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from search.rdo.nets import calibration, held_out, trained
from search.rdo.runs import EXAMPLE, QUICK, plain, run

from graphopt import rdo
from graphopt.errors import (
    ArtifactExistsError,
    CompressionError,
    ConfigError,
    InfeasibleError,
    InputError,
)
from graphopt.rdo import RDOConfig, Session, optimize

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.integration
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
    plain = json.loads(json.dumps(report.to_dict()))
    assert "comparison" in plain.pop("seconds")
    assert written == plain
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
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    run({"target_bits": 5.0}, out=out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


class Stopped(KeyboardInterrupt):
    pass


@pytest.mark.integration
def test_interrupted_run_goes_on_at_the_last_finished_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from graphopt.search.rdo import session as module

    calls: list[int] = []
    fit_block = Session._fit_block

    def counted(self: Session, blockwise: Any, block: Any, *rest: Any) -> Any:
        if len(calls) == 2:
            raise Stopped
        calls.append(block.number)
        return fit_block(self, blockwise, block, *rest)

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
            lambda self, blockwise, block, *rest: (
                calls.append(block.number),
                fit_block(self, blockwise, block, *rest),
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


@pytest.mark.integration
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


def test_norms_that_are_not_folded_are_refused_where_activations_are_rounded() -> None:
    config = {"target_bits": 5.0, "fold_batchnorm": False, "activations": "int8"}
    with pytest.raises(ConfigError, match=r"norms behind \['stem.weight', .* fold_batchnorm=True"):
        optimize(trained(), EXAMPLE, calibration(64), config, progress=False)


def test_targets_out_of_reach_are_refused_with_the_range() -> None:
    with pytest.raises(InfeasibleError, match=r"attainable are 4\.58\d to 8\.58\d bits per weight"):
        run({"target_bits": 3})


def test_missing_data_and_broken_weights_are_refused() -> None:
    with pytest.raises(InputError, match="there are no data"):
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
