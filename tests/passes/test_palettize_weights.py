"""AnnotatePalettization, PalettizeWeights, FakePalettize: what they write and what they leave."""

from __future__ import annotations

import copy

import torch
from helpers.linear_nets import Net, X, annotate, captured, ops

import graphopt
from graphopt.ir.annotations import palette_annotation
from graphopt.passes import (
    FakePalettize,
    PalettizeWeights,
    cluster_annotated,
)
from graphopt.passes.pass_manager import run_passes


def test_annotating_marks_the_constants_and_leaves_the_ops() -> None:
    gm = captured()
    before = ops(gm)
    assert annotate()(gm).modified
    marked = {str(n.target) for n in gm.graph.find_nodes(op="get_attr") if palette_annotation(n)}
    assert marked == {"fc.weight", "out.weight"}
    assert ops(gm) == before


def test_annotations_survive_copies() -> None:
    gm = captured()
    annotate()(gm)
    for other in (copy.deepcopy(gm), graphopt.Program(gm, (X,)).copy().graph_module):
        assert sum(palette_annotation(n) is not None for n in other.graph.nodes) == 2


def test_palettizing_puts_one_lookup_in_front_of_each_reader_of_a_weight() -> None:
    gm = captured()
    run_passes(gm, [annotate(), PalettizeWeights()])
    assert ops(gm) == [
        "graphopt.lut_to_dense.default",
        "aten.linear.default",
        "aten.relu.default",
        "graphopt.lut_to_dense.default",
        "aten.linear.default",
    ]
    assert set(gm.state_dict()) == {
        *("fc.weight_indices", "fc.weight_lut", "fc.bias"),
        *("out.weight_indices", "out.weight_lut"),
    }
    lookup = next(n for n in gm.graph.nodes if "lut_to_dense" in str(n.target))
    frames = [frame for frame, _ in lookup.meta["nn_module_stack"].values()]
    assert frames[-1] == "fc"
    assert "self.out(torch.relu(self.fc(x)))" in lookup.meta["stack_trace"]
    assert tuple(lookup.meta["val"].shape) == (8, 6)


def test_palettized_graph_computes_with_the_clustered_weights() -> None:
    gm = captured()
    annotate()(gm)
    palettes = cluster_annotated(gm)
    expected = Net().eval()
    expected.load_state_dict(gm.state_dict())
    for name, weight in palettes.items():
        expected.state_dict()[name].copy_(weight.dense())
    run_passes(gm, [PalettizeWeights(palettes)])
    torch.testing.assert_close(gm(X), expected(X), rtol=0, atol=0)


def test_fake_palettizing_changes_values_only() -> None:
    gm = captured()
    annotate()(gm)
    names, before = set(gm.state_dict()), ops(gm)
    palettes = cluster_annotated(gm)
    assert FakePalettize(palettes)(gm).modified
    assert ops(gm) == before
    assert set(gm.state_dict()) == names
    assert torch.equal(gm.state_dict()["fc.weight"], palettes["fc.weight"].dense())
