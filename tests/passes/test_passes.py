from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

import graphopt
from graphopt.errors import CompressionError, PassError
from graphopt.ir.annotations import palette_annotation
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import Editor
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.passes import (
    AnnotatePalettization,
    FakePalettize,
    PalettizeWeights,
    RaiseToVocabulary,
    RemoveUnused,
    cluster_annotated,
    pass_manager,
)
from graphopt.passes.pass_base import Pass, PassResult, passes_run
from graphopt.passes.pass_manager import run_passes

X = torch.randn(2, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.out = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(x)))


def captured() -> CapturedModule:
    return graphopt.capture(Net().eval(), (X,)).graph_module


def ops(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def annotate() -> AnnotatePalettization:
    return AnnotatePalettization(KMeansPalettizerConfig())


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


def test_palettizing_puts_one_lookup_in_the_place_of_each_weight() -> None:
    gm = captured()
    run_passes(gm, [annotate(), PalettizeWeights()])
    assert ops(gm) == [
        "graphopt.lut_to_dense.default",
        "graphopt.lut_to_dense.default",
        "aten.linear.default",
        "aten.relu.default",
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


@pytest.mark.parametrize("each", [PalettizeWeights(), FakePalettize({}), RaiseToVocabulary()])
def test_nothing_to_do_changes_nothing(each: Pass) -> None:
    gm = captured()
    AnnotatePalettization(KMeansPalettizerConfig(global_config=None))(gm)
    code = gm.code
    assert not each(gm).modified
    assert gm.code == code


@pytest.mark.parametrize("make", [annotate, PalettizeWeights, RemoveUnused, RaiseToVocabulary])
def test_second_run_of_a_pipeline_changes_nothing(make: type[Pass]) -> None:
    gm = captured()
    run_passes(gm, [annotate(), PalettizeWeights(), RemoveUnused(), RaiseToVocabulary()])
    code, state = gm.code, set(gm.state_dict())
    result = make()(gm)
    assert not result.modified
    assert gm.code == code
    assert set(gm.state_dict()) == state


def test_any_fx_pass_manager_runs_our_passes() -> None:
    gm = captured()
    result = PassManager(passes=[annotate(), PalettizeWeights(), RemoveUnused()])(gm)
    assert "graphopt.lut_to_dense.default" in ops(result.graph_module)
    assert isinstance(annotate()(captured()), PassResult)


def test_unused_nodes_and_constants_go() -> None:
    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.unused = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    gm = graphopt.capture(Wasteful().eval(), (X,)).graph_module
    edit = Editor(gm)
    first = next(n for n in gm.graph.nodes if n.op == "call_function")
    edit.call(torch.ops.aten.relu.default, first.args[0], like=first)
    assert "aten.relu.default" in ops(gm)
    assert RemoveUnused()(gm).modified
    assert ops(gm) == ["aten.linear.default"]
    assert set(gm.state_dict()) == {"fc.weight", "fc.bias"}


def test_pass_that_needs_another_first_says_so() -> None:
    @dataclass(frozen=True)
    class Later(Pass):
        """Does nothing, after annotation."""

        name: ClassVar[str] = "later"
        after: ClassVar[tuple[type[Pass], ...]] = (AnnotatePalettization,)

        def run(self, edit: Editor) -> None:
            pass

    gm = captured()
    with pytest.raises(PassError, match="'later' must come after .'annotate-palettization'"):
        Later()(gm)
    run_passes(gm, [annotate(), Later()])
    assert passes_run(gm) == ("annotate-palettization", "later")


def test_error_in_a_pass_names_the_pass() -> None:
    model = Net().eval()
    model.fc.weight.data[0, 0] = float("nan")
    gm = graphopt.capture(model, (X,)).graph_module
    annotate()(gm)
    with pytest.raises(CompressionError, match="fc.weight") as caught:
        PalettizeWeights()(gm)
    assert "in pass 'palettize-weights'" in caught.value.__notes__[0]


def test_passes_are_values() -> None:
    assert PalettizeWeights(seed=3) == PalettizeWeights(seed=3)
    with pytest.raises(FrozenInstanceError):
        PalettizeWeights().seed = 4  # type: ignore[misc]


def test_graphs_can_be_dumped_between_passes(tmp_path: Path) -> None:
    pass_manager.PassManager([annotate(), PalettizeWeights()], dump_dir=tmp_path).run(captured())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00-annotate-palettization", "01-palettize-weights"]
    assert "PalettizationSpec" in (tmp_path / names[0] / "changes.diff").read_text()
    before, after, changes = (
        (tmp_path / names[1] / name).read_text()
        for name in ("before.txt", "after.txt", "changes.diff")
    )
    assert "get_attr[fc.weight]" in before
    assert "graphopt.lut_to_dense" in after
    assert "\n-%fc_weight" in changes
    assert "\n+%lut_to_dense" in changes
