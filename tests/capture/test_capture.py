from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zoo
from helpers.tiers import some
from torch import Tensor, nn

import graphopt
from graphopt.errors import CaptureError, InputError
from graphopt.ir.module_frames import module_frames


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 4)
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> dict[str, Tensor]:
        y = self.drop(F.relu(self.bn(self.conv(x)))).mean((2, 3))
        y = self.fc(y) + self.shift
        return {"y": y if scale is None else y * scale}


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("size", [7, 8, 13])
def test_graph_from_a_batch_of_one_takes_other_batches_and_sizes(batch: int, size: int) -> None:
    model = Net().eval()
    program = graphopt.capture(model, (torch.randn(1, 3, 8, 8),))
    x = torch.randn(batch, 3, size, size + 1)
    torch.testing.assert_close(program.graph_module(x)["y"], model(x)["y"], rtol=0, atol=0)


@pytest.mark.integration
@pytest.mark.parametrize("length", some([1, 4, 12, 30], lambda length: length == 30))
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_language_models_take_other_lengths(name: str, length: int) -> None:
    model, args = zoo.MODELS[name]()
    program = graphopt.capture(model, args)
    others = tuple(torch.ones(3, length, dtype=arg.dtype) for arg in args)
    torch.testing.assert_close(program.graph_module(*others), model(*others))


def test_keyword_inputs_keep_their_names() -> None:
    model = Net().eval()
    x, scale = torch.randn(1, 3, 8, 8), torch.tensor([2.0])
    program = graphopt.capture(model, (x,), {"scale": scale})
    torch.testing.assert_close(
        program.graph_module(x, scale=scale)["y"], model(x, scale=scale)["y"]
    )


def test_state_dict_keeps_its_names_and_persistence() -> None:
    model = Net().eval()
    module = graphopt.capture(model, (torch.randn(1, 3, 8, 8),)).graph_module
    assert set(module.state_dict()) == set(model.state_dict())
    assert {n for n, _ in module.named_parameters()} == {n for n, _ in model.named_parameters()}


def test_module_stack_and_source_line_are_kept() -> None:
    program = graphopt.capture(Net().eval(), (torch.randn(1, 3, 8, 8),))
    conv = next(n for n in program.graph_module.graph.nodes if "conv2d" in str(n.target))
    assert module_frames(conv)[-1].name == "conv"
    assert module_frames(conv)[-1].type == "torch.nn.modules.conv.Conv2d"
    assert "self.drop(F.relu(self.bn(self.conv(x))))" in conv.meta["stack_trace"]


def test_model_keeps_its_mode_and_values() -> None:
    model = Net().train()
    model.drop.eval()
    before = copy.deepcopy(model.state_dict())
    program = graphopt.capture(model, (torch.randn(4, 3, 8, 8),))
    assert model.training
    assert model.bn.training
    assert not model.drop.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    # captured in evaluation mode: no dropout, running statistics untouched
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(program.graph_module(x)["y"], program.graph_module(x)["y"])


def test_casting_the_captured_module_leaves_the_model_alone() -> None:
    model = Net().eval()
    program = graphopt.capture(model, (torch.randn(1, 3, 8, 8),))
    program.module().half()
    program.graph_module.double()
    assert model.conv.weight.dtype is torch.float32


def test_fixed_dimensions_are_reported_and_guarded() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    program = graphopt.capture(Fixed(), (torch.randn(1, 6),))
    assert program.provenance.static_dims == ("x[1] = 6",)
    static = graphopt.capture(Fixed(), (torch.randn(2, 6),), dynamic_shapes=None)
    assert static.provenance.static_dims == ("x[0] = 2", "x[1] = 6")


def test_inputs_that_the_graph_cannot_serve_are_refused_with_their_shapes() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(1) if x.shape[1] > 5 else x.prod(1)

    program = graphopt.capture(Branch(), (torch.rand(2, 8),))
    assert program.graph_module(torch.ones(3, 9)).tolist() == [9.0, 9.0, 9.0]
    with pytest.raises(InputError, match=r"\(2, 3\)"):
        program.graph_module(torch.rand(2, 3))


@pytest.mark.parametrize("form", ["module", "exported", "training", "file"])
def test_all_forms_of_a_model_give_the_same_program(form: str, tmp_path: Path) -> None:
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    if form == "module":
        source: object = model
    else:
        source = torch.export.export(model, (x,))
        if form == "exported":
            source = source.run_decompositions({})
        if form == "file":
            torch.export.save(source, tmp_path / "m.pt2")
            source = tmp_path / "m.pt2"
    program = graphopt.capture(source, (x,) if form == "module" else None)
    torch.testing.assert_close(program.graph_module(x)["y"], model(x)["y"])
    assert torch.equal(program.example_args[0], x)
    frames = [module_frames(node) for node in program.graph_module.graph.nodes]
    assert {"conv", "bn", "fc"} <= {frame.name for stack in frames for frame in stack}


@pytest.mark.integration
@pytest.mark.parametrize("name", some(["resnet", "llama", "lstm"], lambda name: name == "llama"))
def test_copies_and_saved_modules_compute_the_same_and_keep_metadata(name: str) -> None:
    model, args = zoo.MODELS[name]()
    module = graphopt.capture(model, args).graph_module
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for other in (copy.deepcopy(module), torch.load(stream, weights_only=False)):
        torch.testing.assert_close(other(*args), module(*args), rtol=0, atol=0)
        names = [node.name for node in module.graph.nodes]
        assert [node.name for node in other.graph.nodes] == names
        for mine, theirs in zip(module.graph.nodes, other.graph.nodes, strict=True):
            assert mine.meta.get("nn_module_stack") == theirs.meta.get("nn_module_stack")
            assert mine.meta.get("stack_trace") == theirs.meta.get("stack_trace")


@pytest.mark.integration
def test_exported_program_has_open_dimensions() -> None:
    model = Net().eval()
    program = graphopt.capture(model, (torch.randn(1, 3, 8, 8),))
    exported = program.exported_program
    x = torch.randn(3, 3, 9, 10)
    torch.testing.assert_close(exported.module()(x)["y"], model(x)["y"])


def test_model_that_branches_on_values_is_explained() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:  # decided by data
                return x
            return -x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Identity(), Inner())

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    with pytest.raises(CaptureError) as caught:
        graphopt.capture(Outer(), (torch.randn(3),))
    message = str(caught.value)
    assert "module: block.1 (Inner)" in message
    assert "if x.sum() > 0" in message
    assert "torch.where or" in message
    assert "op: aten" in message


def test_model_of_inference_mode_is_explained() -> None:
    with torch.inference_mode():
        model, x = nn.Linear(3, 3), torch.randn(2, 3)
    with pytest.raises(CaptureError, match=r"outside of it; torch.no_grad\(\) does no harm"):
        graphopt.capture(model, (x,))


def test_wrong_inputs_are_refused(tmp_path: Path) -> None:
    model = Net()
    with pytest.raises(InputError, match="example_inputs are needed"):
        graphopt.capture(model)
    with pytest.raises(InputError, match="fails on the example inputs"):
        graphopt.capture(model, (torch.randn(1, 5, 8, 8),))
    with pytest.raises(InputError, match="cannot capture a int"):
        graphopt.capture(3, (torch.randn(1),))
    with pytest.raises(InputError, match="no such file"):
        graphopt.capture(tmp_path / "absent.pt2")
    (tmp_path / "broken.pt2").write_bytes(b"nothing")
    with pytest.raises(CaptureError, match="program of torch.export"):
        graphopt.capture(tmp_path / "broken.pt2")


class _Named(nn.Module):
    """Names that graph modules or Python have taken, beside the ones that they could be given."""

    def __init__(self) -> None:
        super().__init__()
        self.graph, self.meta, self.code = (
            nn.Linear(3, 3),
            nn.Linear(3, 3),
            nn.Parameter(torch.randn(3)),
        )
        self.heads = nn.ModuleDict({"class": nn.Linear(3, 2), "class_": nn.Linear(3, 2)})
        self.heads["graph"] = nn.Linear(3, 2)
        self.register_buffer("recompile", torch.zeros(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.recompile.add_(1)
        x = self.meta(self.graph(x)) + self.code + self.recompile
        return {name: head(x) for name, head in self.heads.items()}


def test_tensors_whose_names_graphs_cannot_have_get_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = _Named().eval(), torch.randn(2, 3)
    before = list(model.state_dict())
    exported = torch.export.export(model, (x,), strict=False)
    torch.export.save(exported, tmp_path / "m.pt2")
    fresh = copy.deepcopy(model)
    wanted = fresh(x)
    for source, given in ((model, (x,)), (exported, None), (tmp_path / "m.pt2", None)):
        program = graphopt.capture(source, given)
        names = set(program.graph_module.state_dict())
        expected = {"graph_.weight", "meta_.weight", "code_", "recompile_", "heads.graph.weight"}
        assert expected | {"heads.class__.weight", "heads.class_.weight"} <= names
        got = graphopt.compress(program, config={"palettization": {}}).module()(x)
        assert all(torch.allclose(got[name], wanted[name], atol=0.5) for name in wanted)
        assert not torch.equal(got["class"], got["class_"])
        assert torch.equal(graphopt.capture(source, given).module()(x)["class"], wanted["class"])
    assert "graph.weight is called graph_.weight in the program" in caplog.text
    assert list(model.state_dict()) == before
    assert "graph.weight" in exported.state_dict
    assert not model.recompile.any()
