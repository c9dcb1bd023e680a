"""The whole pipeline: budgets, what is stored, what it gains."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.tiers import some
from search.rdo.nets import calibration, held_out, trained
from search.rdo.runs import EXAMPLE, QUICK, plain, run
from torch import nn

from graphopt.analysis.quantized import find_quantized_activations
from graphopt.analysis.stored_values import find_lookups, find_quantized_weights
from graphopt.rdo import optimize

pytestmark = pytest.mark.usefixtures("one_thread")


def kl(model: nn.Module) -> float:
    x, _ = held_out()
    with torch.no_grad():
        exact, found = trained()(x).log_softmax(1), model(x).log_softmax(1)
    return float((exact.exp() * (exact - found)).sum(1).mean())


# --- sizes ----------------------------------------------------------------------------------------
@pytest.mark.integration
@pytest.mark.parametrize("target", some([3.0, 4.19, 6.5], lambda bits: bits == 4.19))
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


@pytest.mark.integration
def test_rate_weight_decides_the_bits() -> None:
    sizes = [
        run(
            {"rate_weight": weight, "candidates": [2, 4, 8], "rounding": {"blocks": "none"}}
        ).report.bits_per_weight
        for weight in (1e-9, 1e-6, 1e-3)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 8 > 4 > sizes[-1]


@pytest.mark.integration
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


@pytest.mark.integration
def test_activations_are_rounded_in_the_result() -> None:
    program, report = run({"target_bits": 5, "activations": "int8"})
    assert len(find_quantized_activations(program.graph_module)) >= 4
    assert report["rate-distortion"].distance < 0.01
    with_weights = find_quantized_weights(program.graph_module)
    assert len(with_weights) == len(report.layers)


@pytest.mark.integration
def test_palettes_go_through_the_same_stages() -> None:
    program, report = run(
        {
            "target_bits": 4,
            "candidates": [1, 2, 3, 4],
            "family": "palette",
            # fewer steps gain too little on held-out batches, with one thread, for a block to be taken
            "rounding": {"blocks": "all", "steps": 200},
        }
    )
    assert report.bits_per_weight <= 4
    assert len(find_lookups(program.graph_module)) == len(report.layers)
    assert report["rate-distortion"].distance < 0.2 * report["uniform 4-bit"].distance
    assert any(layer.how == "adaptive rounding" for layer in report.layers)


@pytest.mark.integration
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


@pytest.mark.integration
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
