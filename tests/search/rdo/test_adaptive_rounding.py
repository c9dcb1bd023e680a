"""Adaptive rounding: brute force over the roundings of one layer, and what a block keeps."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from search.rdo.nets import calibration, trained
from torch import Tensor, nn

from graphopt.rdo import RDOConfig, Session
from graphopt.search.rdo.adaptive_rounding import Rounded, round_block
from graphopt.search.rdo.blockwise_run import BlockwiseRun, GraphBlock
from graphopt.search.rdo.layer_fit import LooseLayer, fit_layer

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = {"feedback": {"enabled": False, "compensate": False}, "blocks": {"scales": False}}


def open_session(model: nn.Module, data: list[Tensor], **options: Any) -> Session:
    config = RDOConfig.from_dict({"target_bits": 8, "draws": 2, **options})
    return Session.open(model, (data[0][:2],), data, config, progress=False)


def rounded(
    session: Session, candidate: str, seed: int = 0
) -> tuple[BlockwiseRun, GraphBlock, Rounded]:
    """The first block of a session, fitted and then rounded."""
    run = session._blockwise_run()
    block = next(run.blocks())
    made = []
    for layer in block.layers:
        target = run.target_of(layer, block)
        own = session.candidates[candidate]
        form = fit_layer(LooseLayer.of(layer), own, target, session.config, 0.0, None)
        run.apply(layer, form)
        made.append((layer, form, layer.weight.tensor.detach()))
    outcome: Rounded | None = None
    for step in round_block(
        run, block, made, session.candidates, session.config.rounding, seed=seed
    ):
        outcome = step
    assert outcome is not None
    return run, block, outcome


@pytest.mark.integration
def test_roundings_of_a_layer_come_near_the_best_of_all() -> None:
    """All 2⁸ ways to round a layer of eight weights up or down are tried."""
    found = [roundings_of_a_layer(seed) for seed in range(8)]
    assert all(reached >= best * (1 - 1e-6) for reached, _, best in found)
    assert np.median([reached / best for reached, _, best in found]) < 1.001
    assert np.mean([reached / best for reached, _, best in found]) < 1.25
    assert np.mean([nearest / best for _, nearest, best in found]) > 1.4


def roundings_of_a_layer(seed: int) -> tuple[float, float, float]:
    """Error that adaptive rounding reaches, that of the nearest values, and the least of all."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(4, 4, generator=generator)
    data = [torch.randn(64, 4, generator=generator) @ mixing for _ in range(4)]
    torch.manual_seed(seed)
    model = nn.Linear(4, 2, bias=False)
    session = open_session(
        model,
        data,
        candidates=["int3"],
        metric="mse",
        held_out=0.0,
        **PLAIN,
        rounding={"steps": 400, "scales": False, "weighting": "none"},
    )
    _, _, outcome = rounded(session, "int3")
    weight = model.weight.detach()
    scale = (-weight.amin(1) / 4).maximum(weight.amax(1) / 3)[:, None]
    low = (weight / scale).floor()
    x = torch.cat(data)
    second = (x.T @ x / len(x)).double()

    def error(dense: Tensor) -> float:
        gap = (weight - dense).double()
        return float(((gap @ second) * gap).sum())

    every = [
        error(scale * (low + torch.tensor(ups).reshape(2, 4)).clamp(-4, 3))
        for ups in itertools.product((0.0, 1.0), repeat=8)
    ]
    nearest = error(scale * (weight / scale).round().clamp(-4, 3))
    form = outcome.fitted["weight"].stored if outcome.fitted else None
    assert outcome.accepted == (form is not None)
    assert outcome.undecided <= 1
    return (nearest if form is None else error(form.dense())), nearest, min(every)


@pytest.mark.parametrize("family", ["integer", "palette"])
def test_a_block_gets_closer_to_its_outputs(family: str) -> None:
    session = open_session(
        trained(),
        calibration(),
        candidates=[2],
        family=family,
        **PLAIN,
        rounding={"steps": 200},
    )
    _, _, outcome = rounded(session, next(iter(session.candidates)))
    assert outcome.accepted
    assert outcome.after < 0.7 * outcome.before
    assert outcome.changed > 0
    assert {form.how for form in outcome.fitted.values()} == {"adaptive rounding"}


def test_an_outcome_that_is_worse_on_held_out_batches_is_dropped() -> None:
    """Trained on what the held-out batches contradict, roundings are not kept."""
    data = calibration()
    held = [
        x + 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) for x in data[:2]
    ]
    same = [torch.zeros_like(x) for x in data[:6]]
    session = open_session(
        trained(),
        [*same, *held],
        candidates=["int4"],
        held_out=0.25,
        rounding={"steps": 60, "learning_rate": 0.5},
    )
    run, block, outcome = rounded(session, "int4")
    assert not outcome.accepted
    assert outcome.fitted == {}
    assert outcome.after >= outcome.before
    form = session.fit(dict.fromkeys((layer.name for layer in session.layers), "int4"))[0]
    kept = run.edit.value(block.layers[0].weight.nodes[0])
    stored = form.layers[block.layers[0].name].stored
    assert stored is not None
    torch.testing.assert_close(kept, stored.dense())


def test_the_outcome_depends_on_the_seed_alone() -> None:
    session = open_session(
        trained(), calibration(), candidates=["int2"], **PLAIN, rounding={"steps": 60}
    )
    first, second = (rounded(session, "int2")[2] for _ in range(2))
    other = rounded(session, "int2", seed=1)[2]
    name = next(iter(first.fitted))
    a, b, c = (each.fitted[name].stored for each in (first, second, other))
    assert a is not None
    assert b is not None
    assert c is not None
    assert torch.equal(a.dense(), b.dense())
    assert not torch.equal(a.dense(), c.dense())


def test_rounded_activations_drop_out_here_and_there() -> None:
    """With QDrop the error in training lies between that of exact and of rounded activations."""
    session = open_session(
        trained(),
        calibration(),
        candidates=["int8"],
        activations="int4",
        rounding={"steps": 30, "drop": 0.5},
    )
    run = session._blockwise_run()
    from graphopt.search.rdo.adaptive_rounding import _Dropping

    block = next(run.blocks())
    wanted = run.exact_outputs(block)[0][0]
    constants = block.forward.constants({})
    errors = [
        float((_Dropping(block.forward, drop)(constants, 0)[0] - wanted).square().mean())
        for drop in (0.0, 0.5, 0.999)
    ]
    assert errors[0] > errors[1] > errors[2]
