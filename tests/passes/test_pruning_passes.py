"""AnnotatePruning, InsertPruners, PruneWeights: what they write and what they leave."""

from __future__ import annotations

import pytest
import torch
from helpers.linear_nets import X, captured, ops
from torch import Tensor

from graphopt.errors import PassError
from graphopt.ir.annotations import pruning_annotation, record_of
from graphopt.ir.captured_module import CapturedModule
from graphopt.numerics.packing import unpack
from graphopt.passes import AnnotatePruning, InsertPruners, PruneWeights
from graphopt.passes.pass_manager import run_passes
from graphopt.pruning import MagnitudePrunerConfig


@pytest.fixture
def gm() -> CapturedModule:
    torch.manual_seed(0)
    return captured()


def annotate(**more: object) -> AnnotatePruning:
    return AnnotatePruning(MagnitudePrunerConfig(**more))  # type: ignore[arg-type]


def annotated(gm: CapturedModule) -> set[str]:
    return {str(n.target) for n in gm.graph.find_nodes(op="get_attr") if pruning_annotation(n)}


def smallest_half(weight: Tensor) -> Tensor:
    """Where the half of the elements with the largest magnitude is."""
    order = weight.abs().flatten().argsort(descending=True)
    kept = torch.zeros(weight.numel(), dtype=torch.bool)
    kept[order[: weight.numel() // 2]] = True
    return kept.reshape(weight.shape)


def test_annotating_marks_weights_and_leaves_the_ops(gm: CapturedModule) -> None:
    before, want = ops(gm), gm(X)
    assert annotate()(gm).modified
    assert annotated(gm) == {"fc.weight", "out.weight"}
    assert ops(gm) == before
    assert torch.equal(gm(X), want)


def test_annotating_says_why_a_weight_is_left(gm: CapturedModule) -> None:
    annotate(module_name_configs={"out": None})(gm)
    assert annotated(gm) == {"fc.weight"}
    row = record_of(gm)["out.weight"]
    assert row.status == "skipped"
    assert row.detail


def test_annotating_again_gives_the_same_annotations_and_rows(gm: CapturedModule) -> None:
    run_passes(gm, [annotate(module_name_configs={"out": None})])
    marked, rows = annotated(gm), record_of(gm).rows
    run_passes(gm, [annotate(module_name_configs={"out": None})])
    assert annotated(gm) == marked
    assert record_of(gm).rows == rows


def test_pruners_keep_everything_until_they_are_told(gm: CapturedModule) -> None:
    want = gm(X)
    annotate(module_name_configs={"out": None})(gm)
    assert InsertPruners()(gm).modified
    called = [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]
    assert len(called) == 1
    assert "fc_weight" in called[0]
    assert torch.equal(gm(X), want)
    pruner = gm.get_submodule(called[0])
    mask = smallest_half(gm.state_dict()["fc.weight"])
    pruner.mask.copy_(mask)  # type: ignore[union-attr, operator]
    hidden = torch.relu(X @ (gm.fc.weight * mask).T + gm.fc.bias)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(gm(X), hidden @ gm.out.weight.T)  # type: ignore[union-attr, operator]


def test_pruners_are_inserted_once(gm: CapturedModule) -> None:
    run_passes(gm, [annotate(), InsertPruners()])
    nodes = len(gm.graph.nodes)
    assert not InsertPruners()(gm).modified
    assert len(gm.graph.nodes) == nodes


def test_pruning_stores_the_largest_values_and_a_mask(gm: CapturedModule) -> None:
    weights = {name: value.clone() for name, value in gm.state_dict().items()}
    kept = {name: smallest_half(weights[name]) for name in ("fc.weight", "out.weight")}
    assert run_passes(gm, [annotate(), PruneWeights(kept)])
    state = gm.state_dict()
    assert ops(gm).count("graphopt.sparse_to_dense.default") == 2
    for name, mask in kept.items():
        assert torch.equal(state[f"{name}_values"], weights[name][mask])
        bits = unpack(state[f"{name}_mask"], 1, mask.numel())
        assert torch.equal(bits.bool().reshape(mask.shape), mask)
        row = record_of(gm)[name]
        assert row.status == "pruned"
        dropped = (weights[name] * ~mask).double().square().sum()
        ratio = weights[name].double().square().sum() / dropped
        assert row.snr_db == pytest.approx(10 * float(ratio.log10()), abs=1e-6)
    hidden = torch.relu(X @ (weights["fc.weight"] * kept["fc.weight"]).T + weights["fc.bias"])
    torch.testing.assert_close(gm(X), hidden @ (weights["out.weight"] * kept["out.weight"]).T)


def test_pruning_leaves_weights_without_an_annotation(gm: CapturedModule) -> None:
    run_passes(gm, [annotate(module_name_configs={"out": None}), PruneWeights()])
    assert {"out.weight", "fc.weight_values", "fc.weight_mask"} <= set(gm.state_dict())
    assert record_of(gm)["out.weight"].status == "skipped"


def test_pruning_again_changes_nothing(gm: CapturedModule) -> None:
    run_passes(gm, [annotate(), PruneWeights()])
    rows = record_of(gm).rows
    assert not PruneWeights()(gm).modified
    assert record_of(gm).rows == rows


@pytest.mark.parametrize("each", [InsertPruners(), PruneWeights()])
def test_weights_are_annotated_first(gm: CapturedModule, each: PruneWeights) -> None:
    with pytest.raises(PassError, match="annotate-pruning"):
        each(gm)
