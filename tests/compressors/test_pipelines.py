from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra import pass_manager as fx_passes

import graphopt
from graphopt import pipelines
from graphopt.errors import InputError, PassError
from graphopt.ir.annotations import handed_on, passes_run
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import Editor
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.passes import PalettizeWeights
from graphopt.passes.pass_base import Pass, PassResult
from graphopt.pipelines import PassManager, Pipeline
from graphopt.prepared.findings import findings_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@dataclass(frozen=True)
class Nothing(Pass):
    """Changes nothing."""

    name: ClassVar[str] = "nothing"

    def run(self, edit: Editor) -> None:
        pass


@dataclass(frozen=True)
class Miscompile(Pass):
    """Gives the first relu's input twice its value."""

    name: ClassVar[str] = "miscompile"

    def run(self, edit: Editor) -> None:
        for node in edit.calls(torch.ops.aten.relu.default):
            doubled = edit.call(torch.ops.aten.mul.Tensor, node.args[0], 2.0, like=node)
            edit.set_args(node, (doubled,))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().train()
    for _ in range(4):
        model(torch.randn(8, 3, 8, 8))
    return model.eval()


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(4)]


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
JOINT = {"palettization": {}, "quantization": {}}


def captured(net: nn.Module) -> CapturedModule:
    return graphopt.capture(net, (X,)).graph_module


def named(data: list[Tensor]) -> dict[str, Pipeline]:
    return {
        "palettize": pipelines.palettize(KMeansPalettizerConfig.presets.w4(group_size=8), data),
        "quantize": pipelines.quantize(None, data),
        "joint": pipelines.joint(JOINT, data, tune_steps=3),
        "rdo": pipelines.rdo(data, {"target_bits": 6.0, "candidates": [4, 8]}),
    }


@pytest.mark.integration
@pytest.mark.parametrize("name", ["palettize", "quantize", "joint", "rdo"])
def test_torch_fx_manager_runs_a_pipeline_pass_by_pass_like_ours(
    net: nn.Module, data: list[Tensor], name: str
) -> None:
    theirs, ours = captured(net), captured(net)
    for each in named(data)[name]:
        # a manager of theirs with the passes alone knows nothing of our order
        result = fx_passes.PassManager(passes=[each])(theirs)
        assert result.graph_module is theirs
    named(data)[name](ours)
    theirs.graph.lint()
    assert torch.equal(theirs(X), ours(X))
    assert passes_run(theirs) == passes_run(ours)
    assert any(
        "graphopt." in str(n.target) or "decomposed" in str(n.target) for n in theirs.graph.nodes
    )


def test_torch_fx_manager_runs_all_passes_in_one_go(net: nn.Module, data: list[Tensor]) -> None:
    gm = captured(net)
    manager = fx_passes.PassManager(passes=list(named(data)["palettize"]))
    assert manager(gm).graph_module is gm
    assert torch.equal(gm(X), named(data)["palettize"].run(net, (X,)).module()(X))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("palettize", KMeansPalettizerConfig.presets.w4(group_size=8)),
        ("quantize", {"quantization": {}}),
        ("joint", JOINT),
    ],
)
def test_pipeline_gives_what_compress_gives(
    net: nn.Module, data: list[Tensor], name: str, config: object
) -> None:
    found = named(data)[name].run(net, (X,))
    steps = 3 if name == "joint" else 0
    want = graphopt.compress(
        net,
        (X,),
        config,
        calibration_data=data,
        tune_steps=steps,  # type: ignore[arg-type]
    )
    assert torch.equal(found.module()(X), want.module()(X))
    assert found.report().rows == want.report().rows


@pytest.mark.integration
def test_rdo_pipeline_gives_what_optimize_gives(net: nn.Module, data: list[Tensor]) -> None:
    found = named(data)["rdo"].run(net, (X,))
    want = graphopt.rdo.optimize(net, (X,), data, {"target_bits": 6.0, "candidates": [4, 8]})
    assert torch.equal(found.module()(X), want.program.module()(X))


@pytest.mark.parametrize("name", ["palettize", "quantize", "joint", "rdo"])
def test_every_pass_of_a_named_pipeline_verifies(
    net: nn.Module, data: list[Tensor], name: str
) -> None:
    program = named(data)[name].run(net, (X,), verify=True)
    report = program.pass_report
    assert [record.name for record in report] == list(named(data)[name].names)
    checked = [record for record in report if record.error is not None]
    assert all(record.error <= record.tolerance for record in checked)
    assert {"palettize-weights", "convert-quantization", "optimize-rate-distortion"} & {
        record.name for record in report
    }
    assert len(checked) >= 2


def test_miscompiling_pass_is_found_by_name(net: nn.Module, data: list[Tensor]) -> None:
    wrong = named(data)["quantize"].insert_before("annotate-quantization", Miscompile())
    wrong.run(net, (X,))  # nobody looks
    with pytest.raises(PassError, match="'miscompile' changes what the graph computes"):
        wrong.run(net, (X,), verify=True)


def test_wrong_palettes_are_found_though_the_pass_is_lossy(net: nn.Module) -> None:
    @dataclass(frozen=True)
    class Swapped(PalettizeWeights):
        """Turns each table round."""

        def run(self, edit: Editor) -> None:
            super().run(edit)
            for node in edit.constants():
                if str(node.target).endswith("_lut"):
                    edit.set_value(node, edit.value(node).flip(-2).contiguous())

    wrong = pipelines.palettize().replace("palettize-weights", Swapped())
    with pytest.raises(PassError, match="'palettize-weights' changes what"):
        wrong.run(net, (X,), verify=True)


def test_wrong_scales_are_found_though_the_pass_is_lossy(
    net: nn.Module, data: list[Tensor]
) -> None:
    from graphopt.passes import ConvertQuantization

    @dataclass(frozen=True)
    class Wider(ConvertQuantization):
        """Dequantizes with twice the scale."""

        def run(self, edit: Editor) -> None:
            super().run(edit)
            for node in list(edit.gm.graph.nodes):
                if "dequantize_per_tensor" in str(node.target):
                    edit.set_args(node, (node.args[0], 2 * node.args[1], *node.args[2:]))

    wrong = named(data)["quantize"].replace("convert-quantization", Wider())
    with pytest.raises(PassError, match="'convert-quantization' changes what"):
        wrong.run(net, (X,), verify=True)


def test_foreign_pass_may_not_change_values(net: nn.Module) -> None:
    def scale_output(gm: fx.GraphModule) -> PassResult:
        output = gm.graph.output_node()
        with gm.graph.inserting_before(output):
            made = gm.graph.call_function(torch.mul, (output.args[0][0], 1.001))
        output.args = ((made,),)
        gm.recompile()
        return PassResult(gm, True)

    gm = captured(net)
    PassManager([scale_output], verify=True, example_inputs=X, foreign_tolerance=1e-2).run(gm)
    with pytest.raises(PassError, match="'scale_output' changes"):
        PassManager([scale_output], verify=True, example_inputs=X).run(captured(net))


def test_verification_needs_inputs(net: nn.Module) -> None:
    with pytest.raises(InputError, match="example_inputs"):
        PassManager([Nothing()], verify=True).run(captured(net))


def test_pipelines_can_be_changed(net: nn.Module) -> None:
    base = pipelines.palettize()
    assert base.insert_after("remove-unused", Nothing()).names == (*base.names, "nothing")
    assert base.insert_before("raise-to-vocabulary", Nothing()).names == ("nothing", *base.names)
    assert base.replace("fit-palettes", Nothing()).names == tuple(
        "nothing" if name == "fit-palettes" else name for name in base.names
    )
    assert base.without("fit-palettes").run(net, (X,)).report().palettized
    order = [base.names[-1], *base.names[:-1]]
    assert base.reordered(order).names == tuple(order)
    with pytest.raises(InputError, match="no pass 'nothing'"):
        base.without("nothing")
    with pytest.raises(InputError, match="needs each of"):
        base.reordered(order[1:])


def test_wrong_order_is_refused_with_what_is_missing() -> None:
    base = pipelines.palettize()
    with pytest.raises(
        PassError, match="'palettize-weights' must come after .'annotate-palettization'"
    ):
        base.without("fit-palettes").without("annotate-palettization")
    names = list(pipelines.quantize().names)
    first, second = names.index("annotate-quantization"), names.index("convert-quantization")
    names[first], names[second] = names[second], names[first]
    with pytest.raises(PassError, match="must come after .'annotate-quantization'"):
        pipelines.quantize().reordered(names)


def test_wrong_order_is_refused_before_anything_runs(net: nn.Module) -> None:
    gm = captured(net)
    text = str(gm.graph)
    with pytest.raises(PassError, match="'palettize-weights' must come after"):
        PassManager([Miscompile(), PalettizeWeights()]).run(gm)
    assert str(gm.graph) == text


def test_passes_that_ran_before_count(net: nn.Module) -> None:
    gm = captured(net)
    whole = pipelines.palettize(correct_statistics=False)
    PassManager(whole[:-2]).run(gm)
    PassManager(whole[-2:]).run(gm)
    assert torch.equal(gm(X), whole.run(net, (X,)).module()(X))


def test_report_has_times_and_node_counts(net: nn.Module) -> None:
    report = pipelines.palettize().run(net, (X,)).pass_report
    rewrite = next(record for record in report if record.name == "palettize-weights")
    assert rewrite.modified
    assert (
        rewrite.nodes_after == rewrite.nodes_before + 4
    )  # two weights, each two constants and a lookup
    assert 0 < rewrite.seconds <= report.seconds
    assert "palettize-weights" in str(report)
    assert report.to_dicts()[0]["name"] == "raise-to-vocabulary"


def test_dump_holds_graphs_and_a_diff(net: nn.Module, tmp_path: Path) -> None:
    pipelines.palettize().run(net, (X,), dump_dir=tmp_path)
    folders = sorted(each.name for each in tmp_path.iterdir())
    assert folders[0] == "00-raise-to-vocabulary"
    changes = (next(tmp_path.glob("*-palettize-weights")) / "changes.diff").read_text()
    assert changes.startswith("--- before\n+++ after\n")
    assert "-%conv_weight : f32[16, 3, 3, 3] = get_attr[conv.weight]" in changes
    assert "+%lut_to_dense_default : f32[16, 3, 3, 3] = graphopt.lut_to_dense.default" in changes


def test_pipeline_leaves_the_model_and_its_copy_alone(net: nn.Module, data: list[Tensor]) -> None:
    before = copy.deepcopy(net.state_dict())
    program = named(data)["joint"].run(net, (X,))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert handed_on(program.graph_module) is not None
    assert findings_of(program.graph_module).reference is None


def test_pipelines_inside_pipelines_are_their_passes() -> None:
    inner = pipelines.palettize()
    whole = pipelines.Pipeline("whole", (inner,))
    assert whole.names == inner.names
    model, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(2, 16)
    program = whole.run(model, (x,), verify=True)
    assert torch.equal(program.module()(x), inner.run(model, (x,)).module()(x))


def test_what_cannot_be_called_is_no_pass() -> None:
    with pytest.raises(PassError, match="3 is no pass"):
        pipelines.palettize().insert_after("remove-unused", 3)
