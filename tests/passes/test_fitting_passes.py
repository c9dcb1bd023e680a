"""FitPalettes, Tune, InsertTaps: passes that fit weights, and what they need."""

from __future__ import annotations

import pytest
import torch
from helpers.linear_nets import X, annotate, captured, ops

from graphopt.errors import PassError
from graphopt.fitting.sensitivity import GradientCollector
from graphopt.ir.captured_module import CapturedModule
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.passes import (
    AnnotatePalettization,
    FitPalettes,
    InsertTaps,
    KeepReference,
    PalettizeWeights,
    Tune,
    cluster_annotated,
)
from graphopt.passes.pass_manager import run_passes
from graphopt.prepared.findings import findings_of

DATA = torch.randn(8, 2, 6, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.fixture
def gm() -> CapturedModule:
    torch.manual_seed(0)
    return captured()


def with_two_bits() -> AnnotatePalettization:
    config = {"global_config": {"op_state_spec": {"weight": {"n_bits": 2}}}}
    return AnnotatePalettization(KMeansPalettizerConfig.from_dict(config))


def test_palettes_without_data_are_those_of_clustering_and_the_graph_stays(
    gm: CapturedModule,
) -> None:
    annotate()(gm)
    want, before, out = cluster_annotated(gm), ops(gm), gm(X)
    assert not FitPalettes()(gm).modified
    palettes = findings_of(gm).stored
    assert palettes.keys() == want.keys()
    for name, palette in palettes.items():
        assert torch.equal(palette.dense(), want[name].dense())
    assert ops(gm) == before
    assert torch.equal(gm(X), out)


def test_palettes_are_fitted_only_behind_annotations(gm: CapturedModule) -> None:
    with pytest.raises(PassError, match="'fit-palettes' must come after"):
        FitPalettes()(gm)


def test_tuning_brings_the_outputs_nearer_to_those_before_and_keeps_the_codes(
    gm: CapturedModule,
) -> None:
    data = torch.randn(16, 8, 6, generator=torch.Generator().manual_seed(0)).unbind()
    want = [gm(x) for x in data]
    run_passes(gm, [KeepReference(), with_two_bits(), PalettizeWeights()])
    codes = gm.state_dict()["fc.weight_indices"].clone()

    def error() -> float:
        return sum(float((gm(x) - y).square().sum()) for x, y in zip(data, want, strict=True))

    before = error()
    assert Tune(data, steps=200, progress=False)(gm).modified
    assert error() < 0.8 * before
    assert torch.equal(gm.state_dict()["fc.weight_indices"], codes)


def test_tuning_needs_a_reference(gm: CapturedModule) -> None:
    with pytest.raises(PassError, match="'tune' must come after"):
        Tune(DATA)(gm)


def test_taps_let_values_pass_and_tell_gradients_of_the_weights(gm: CapturedModule) -> None:
    out = gm(X)
    collector = GradientCollector()
    assert InsertTaps(collector, ["fc.weight", "out.weight"])(gm).modified
    assert sum(node.op == "call_module" for node in gm.graph.nodes) == 2
    torch.testing.assert_close(gm(X), out, rtol=0, atol=0)


def test_taps_of_no_weight_change_nothing(gm: CapturedModule) -> None:
    assert not InsertTaps(GradientCollector(), [])(gm).modified
