"""KeepReference, CorrectStatistics, ForgetReference: a graph to compare with, and its use."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.linear_nets import X, annotate, captured, ops

from graphopt.errors import InputError, PassError
from graphopt.ir.captured_module import CapturedModule
from graphopt.passes import (
    CorrectStatistics,
    ForgetReference,
    KeepReference,
    PalettizeWeights,
    reference_of,
)
from graphopt.passes.pass_manager import run_passes
from graphopt.prepared.findings import findings_of, keep_findings

DATA = [torch.randn(64, 6) for _ in range(4)]


@pytest.fixture
def gm() -> CapturedModule:
    torch.manual_seed(0)
    return captured()


def test_a_reference_is_the_graph_before_and_shares_its_tensors(gm: CapturedModule) -> None:
    with pytest.raises(InputError, match="KeepReference"):
        reference_of(gm)
    before, want = ops(gm), gm(X)
    assert not KeepReference()(gm).modified
    kept = reference_of(gm)
    assert ops(gm) == ops(kept) == before
    assert torch.equal(kept(X), want)
    assert kept.fc.weight is gm.fc.weight


def test_a_reference_is_forgotten(gm: CapturedModule) -> None:
    KeepReference()(gm)
    assert not ForgetReference()(gm).modified
    with pytest.raises(InputError, match="KeepReference"):
        reference_of(gm)
    assert not ForgetReference()(gm).modified


def damaged(gm: CapturedModule) -> CapturedModule:
    """Keep a reference, then palettize the weights, so that means of outputs move."""
    run_passes(gm, [KeepReference(), annotate(), PalettizeWeights()])
    return gm


def test_means_of_outputs_are_those_of_the_reference_again(gm: CapturedModule) -> None:
    data = [x + 1 for x in DATA]
    wanted = {key: value.detach().double() for key, value in gm.state_dict().items()}
    state = damaged(gm).state_dict()
    codes = state["fc.weight_indices"]
    index = torch.stack([codes & 15, codes >> 4], -1).flatten().long()
    weight = state["fc.weight_lut"].flatten()[index].reshape(8, 6).double()
    shift = (torch.cat(data).double() @ (wanted["fc.weight"] - weight).T).mean(0)
    assert shift.abs().max() > 1e-3
    assert CorrectStatistics(data)(gm).modified
    bias = gm.state_dict()["fc.bias"].double()
    torch.testing.assert_close(bias, wanted["fc.bias"] + shift, rtol=0, atol=1e-5)


def test_layers_that_are_not_compressed_are_left(gm: CapturedModule) -> None:
    KeepReference()(gm)
    assert not CorrectStatistics(DATA)(gm).modified


def test_correcting_again_changes_no_value(gm: CapturedModule) -> None:
    damaged(gm)
    CorrectStatistics(DATA)(gm)
    state = copy.deepcopy(gm.state_dict())
    CorrectStatistics(DATA)(gm)
    for name, value in gm.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=1e-5)


def test_weights_that_were_fitted_to_outputs_are_left(gm: CapturedModule) -> None:
    damaged(gm)
    keep_findings(gm, fitted_to_outputs=True)
    state = copy.deepcopy(gm.state_dict())
    assert findings_of(gm).fitted_to_outputs
    assert not CorrectStatistics(DATA)(gm).modified
    assert all(torch.equal(value, state[name]) for name, value in gm.state_dict().items())


def test_a_reference_is_kept_first(gm: CapturedModule) -> None:
    with pytest.raises(PassError, match="keep-reference"):
        CorrectStatistics(DATA)(gm)
