"""Passes in random legal orders: each computes what the graph before it did, or what it says."""

from __future__ import annotations

import torch
from helpers.fuzzing import budget, counted
from helpers.random_nets import COMPRESSIONS, Plan, RandomNet, compression, nets
from hypothesis import given
from hypothesis import strategies as st

import graphopt
from graphopt.errors import PassError
from graphopt.passes import (
    AnnotatePalettization,
    AnnotatePruning,
    ExpandSparse,
    ExpandTables,
    FoldBatchNorm,
    FoldComputedWeights,
    IntegersToTables,
    PalettizeWeights,
    PruneWeights,
    RemoveUnused,
    TablesToIntegers,
)
from graphopt.passes.pass_base import Pass
from graphopt.pipelines import Pipeline


def passes() -> list[Pass]:
    joint = compression("joint")
    assert joint.palettization is not None
    assert joint.pruning is not None
    return [
        AnnotatePruning(joint.pruning, "warn"),
        PruneWeights(),
        AnnotatePalettization(joint.palettization, "warn"),
        PalettizeWeights(),
        FoldBatchNorm(),
        FoldComputedWeights(),
        RemoveUnused(),
        ExpandTables(),
        ExpandSparse(),
        TablesToIntegers(),
        IntegersToTables(),
    ]


@budget(3, share=0.3)
@given(plan=nets(4), order=st.lists(st.integers(0, 10), min_size=1, max_size=8))
def test_passes_in_any_legal_order_keep_what_they_say(plan: Plan, order: list[int]) -> None:
    known = passes()
    torch.manual_seed(plan.seed)
    x = torch.randn(plan.batch, plan.length, plan.width).to(plan.dtype)
    with counted("pipeline"):
        pipeline = Pipeline("random", tuple(known[place] for place in order))
        program = graphopt.capture(RandomNet(plan).eval(), (x,))
        try:
            pipeline.run(program, verify=True)
        except PassError as error:
            # orders are refused when the pipeline is made
            raise AssertionError(f"{[each.name for each in pipeline.passes]}: {error}") from error


@budget(2, share=0.1)
@given(plan=nets(4), kind=st.sampled_from(COMPRESSIONS))
def test_whole_flows_keep_what_they_say(plan: Plan, kind: str) -> None:
    torch.manual_seed(plan.seed)
    x = torch.randn(plan.batch, plan.length, plan.width).to(plan.dtype)
    with counted(f"flow {kind}"):
        pipeline = graphopt.pipelines.joint(compression(kind), [x], on_unmatched="warn")
        try:
            pipeline.run(RandomNet(plan).eval(), (x,), verify=True)
        except PassError as error:
            raise AssertionError(str(error)) from error
