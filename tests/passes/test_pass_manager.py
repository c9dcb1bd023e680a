"""Passes as values, their order, their errors, and the manager that runs them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers.linear_nets import Net, X, annotate, captured, ops
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

import graphopt
from graphopt.errors import CompressionError, PassError
from graphopt.ir.annotations import passes_run
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import Editor
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.passes import (
    AbsorbChannelScale,
    AnnotatePalettization,
    CorrectBias,
    FakePalettize,
    PalettizeWeights,
    RaiseToVocabulary,
    ReestimateBatchNorm,
    RemoveUnused,
    pass_manager,
)
from graphopt.passes.pass_base import Pass, PassResult
from graphopt.passes.pass_manager import run_passes


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
    gm = graphopt.capture(model, (X,)).graph_module
    annotate()(gm)
    gm.fc.weight.data[0, 0] = float("nan")
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


@pytest.mark.parametrize(
    "each",
    [
        AbsorbChannelScale(),
        ReestimateBatchNorm([]),
        CorrectBias([], CapturedModule({}, fx.Graph())),
    ],
    ids=lambda each: each.name,
)
def test_passes_are_values_that_leave_an_empty_graph_alone(each: Pass) -> None:
    assert not each(graphopt.capture(nn.ReLU(), (torch.randn(2, 3),)).graph_module).modified


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_rewrites_in_16_bits_may_round_as_these_do_and_wrong_ones_are_seen(
    kind: torch.dtype,
) -> None:
    @dataclass(frozen=True)
    class Scales(Pass):
        name: ClassVar[str] = "scales"
        by: float = 1.0

        def run(self, edit: Editor) -> None:
            (output,) = edit.gm.graph.find_nodes(op="output")
            (value,) = output.all_input_nodes
            scaled = edit.call(torch.ops.aten.mul.Tensor, value, self.by, like=output)
            edit.substitute(output, value, scaled)

    rounding = torch.finfo(kind).eps
    x = X.to(kind)

    def run(by: float) -> None:
        gm = graphopt.capture(Net().to(kind).eval(), (x,)).graph_module
        pass_manager.PassManager([Scales(by)], verify=True, example_inputs=(x,)).run(gm)

    if kind is not torch.float32:
        run(1 + rounding)
    with pytest.raises(PassError, match="changes what the graph computes"):
        run(1 + 8 * max(rounding, 1e-5))
