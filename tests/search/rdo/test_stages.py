"""The stages by themselves: costs, predictions, choices, scores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

import pytest
import torch
from helpers.pools import POOLS
from search.rdo.nets import calibration, trained
from search.rdo.runs import EXAMPLE, QUICK, plain, right, run
from torch import Tensor

from graphopt import rdo
from graphopt.errors import (
    ConfigError,
    InputError,
)
from graphopt.passes import Resources
from graphopt.rdo import RDOConfig, Session
from graphopt.run.activation_store import ActivationStore

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the session's stages -------------------------------------------------------------------------
@pytest.mark.integration
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


def test_a_limit_of_memory_changes_no_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"rate_weight": 1e-6, "candidates": [4, 8], "activations": "int8", "draws": 1}
    rounding = {"blocks": "all", "steps": 3}
    config = RDOConfig.from_dict({**settings, "rounding": rounding})
    moved, real = [], ActivationStore._moved

    def counted(store: ActivationStore, leaf: Tensor) -> Tensor:
        moved.append(leaf.numel())
        return real(store, leaf)

    monkeypatch.setattr(ActivationStore, "_moved", counted)
    found = []
    for resources in (None, Resources(activation_memory=1_000, work_dir=tmp_path)):
        session = Session.open(
            trained(), EXAMPLE, calibration(), config, progress=False, resources=resources
        )
        costs = session.search(1e-6, progress=False)
        blocks = range(len(session.blocks))
        fits = session.fit(costs.choice, rounded=list(blocks), progress=False)
        found.append((costs, session.program(fits).graph_module.state_dict()))
        assert bool(moved) == (resources is not None)
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())
    with pytest.raises(ConfigError, match="no size"):
        run({"target_bits": 5.0}, activation_memory="plenty")


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


@pytest.mark.parametrize("pool", POOLS)
def test_costs_do_not_depend_on_where_candidates_are_fitted(pool: Callable[[], Executor]) -> None:
    config = RDOConfig.from_dict(
        {"rate_weight": 1e-6, "candidates": [2, 4], "blocks": {"rounds": 1}, "draws": 1}
    )
    session = Session.open(trained(), EXAMPLE, calibration()[:2], config, progress=False)
    here = session.search(1e-6, progress=False)
    with pool() as executor:
        assert session.search(1e-6, progress=False, executor=executor) == here


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
@pytest.mark.integration
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


@pytest.mark.integration
def test_scores_of_different_length_are_refused() -> None:
    lengths = iter([3, 4, 4, 4])
    with pytest.raises(InputError, match="scores of shape"):
        run(
            {"target_bits": 6, "rounding": {"blocks": "none"}},
            evaluate=lambda _: torch.zeros(next(lengths)),
        )
