"""Programs that are built from captured graphs are those that torch's tracer makes of them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import graphopt
from graphopt.ir import program as program_module
from graphopt.ir.decomposing import decomposed
from graphopt.ir.lifting import lifted
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.quantization import QuantizerConfig


class Norms(nn.Module):
    """Norms of two kinds of sizes, a view that copies, and a batch of the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.again = nn.BatchNorm2d(4)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.again(torch.relu(self.norm(self.conv(x))))
        return self.fc(
            nn.functional.adaptive_avg_pool2d(y, 2).transpose(1, 3).reshape(x.shape[0], -1)
        )


class Keywords(nn.Module):
    """Nested inputs by name, tied weights, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, *, extra: dict[str, Tensor]) -> dict[str, Any]:
        hidden = self.table(ids) + extra["shift"]
        return {"hidden": hidden, "scores": [self.head(hidden), hidden.softmax(-1)]}


class Counter3(nn.Module):
    """State that a call writes and a later op of the same call reads."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.copy_(self.seen * 0.5 + x)
        return self.seen + x


class Ifs(nn.Module):
    """Control flow, which only a tracer can make a program of."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))


_IDS = torch.arange(6).reshape(2, 3)
MODELS: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {
    "norms": (Norms(), (torch.linspace(-1, 1, 2 * 3 * 36).reshape(2, 3, 6, 6),), {}),
    "keywords": (Keywords(), (_IDS,), {"extra": {"shift": torch.ones(2, 3, 6)}}),
    "state": (Counter3(), (torch.linspace(-1, 1, 6).reshape(2, 3),), {}),
    "recurrent": (
        nn.GRU(4, 3, batch_first=True),
        (torch.linspace(-1, 1, 24).reshape(2, 3, 4),),
        {},
    ),
}


def captured(name: str) -> graphopt.Program:
    model, args, kwargs = MODELS[name]
    return graphopt.capture(model.eval(), args, kwargs)


def traced(program: graphopt.Program, dynamic: bool) -> ExportedProgram:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program_module, "lifted", lambda *_, **__: None)
        return program.export(dynamic=dynamic)


def ops(exported: ExportedProgram) -> Counter[str]:
    return Counter(str(n.target) for n in exported.graph.nodes if n.op == "call_function")


def results(exported: ExportedProgram, args: Any, kwargs: Any) -> list[Any]:
    module = copy.deepcopy(exported.module())
    with torch.no_grad():
        # twice: the second call sees what the first has written
        outputs = [module(*args, **kwargs) for _ in range(2)]
    return [*pytree.tree_leaves(outputs), *module.buffers()]


def assert_same(built: ExportedProgram, want: ExportedProgram, args: Any, kwargs: Any) -> None:
    torch.testing.assert_close(
        results(built, args, kwargs), results(want, args, kwargs), rtol=0, atol=0
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_built_program_is_the_traced_one(name: str, dynamic: bool) -> None:
    program = captured(name)
    args, kwargs = program.example_args, program.example_kwargs
    assert lifted(program.graph_module, args, kwargs, dynamic=dynamic) is not None
    built, want = program.export(dynamic=dynamic), traced(program, dynamic)
    assert ops(built) == ops(want)
    assert_same(built, want, args, kwargs)
    for ours, theirs in (
        (built.graph_signature.user_inputs, want.graph_signature.user_inputs),
        (built.graph_signature.parameters, want.graph_signature.parameters),
        (
            list(built.graph_signature.buffers_to_mutate.values()),
            list(want.graph_signature.buffers_to_mutate.values()),
        ),
    ):
        assert list(ours) == list(theirs)
    assert built.state_dict.keys() == want.state_dict.keys()
    assert built.call_spec == want.call_spec


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_graph_and_not_copied(name: str) -> None:
    program = captured(name)
    built = lifted(program.graph_module, program.example_args, program.example_kwargs)
    assert built is not None
    held = {t.data_ptr() for t in program.graph_module.state_dict().values()}
    assert {t.data_ptr() for t in built.state_dict.values()} <= held


@pytest.mark.parametrize("name", ["norms", "recurrent"])
def test_open_program_takes_other_sizes(name: str) -> None:
    program = captured(name)
    (x,) = program.example_args
    module = program.exported_program.module()
    for batch in (1, 2, 5):
        other = x[:1].repeat(batch, *[1] * (x.ndim - 1))
        want = MODELS[name][0](other)
        torch.testing.assert_close(module(other), want)


def test_fixed_program_has_no_open_size() -> None:
    program = captured("norms")
    for node in program.export().graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val", ())):
            assert all(isinstance(size, int) for size in value.shape)
            assert "sym_size" not in str(node.target)


def test_compressed_program_is_the_traced_one() -> None:
    model, args, _ = MODELS["norms"]
    for config in (KMeansPalettizerConfig.presets.w4(), QuantizerConfig.presets.w8()):
        program = graphopt.compress(model, args, config)
        for dynamic in (False, True):
            built, want = program.export(dynamic=dynamic), traced(program, dynamic)
            assert ops(built) == ops(want)
            assert_same(built, want, args, {})


def test_control_flow_is_left_to_the_tracer() -> None:
    program = graphopt.capture(Ifs(), (torch.ones(3),))
    assert lifted(program.graph_module, program.example_args, {}) is None
    assert torch.equal(program.export().module()(torch.ones(3)), torch.full((3,), 2.0))


@pytest.mark.parametrize("name", MODELS)
def test_decomposition_of_single_calls_is_that_of_the_whole(name: str) -> None:
    program = captured(name)
    args, kwargs = program.example_args, program.example_kwargs
    table = torch.export.default_decompositions()
    want = program.export().run_decompositions(dict(table))
    got = decomposed(program.export(), dict(table))
    got.graph.lint()
    assert ops(got) == ops(want)
    assert_same(got, want, args, kwargs)


def test_rules_may_make_tensors() -> None:
    def rule(x: Tensor) -> Tensor:
        return x + torch.arange(3) + 1

    program = graphopt.capture(nn.ReLU(), (torch.ones(2, 3),), dynamic_shapes=None)
    (relu,) = {n.target for n in program.export().graph.nodes if "relu" in str(n.target)}
    got = decomposed(program.export(), {relu: rule})
    assert torch.equal(got.module()(torch.zeros(2, 3)), torch.tensor([[1.0, 2.0, 3.0]] * 2))


def test_rule_that_leaves_a_call_is_not_traced() -> None:
    calls = []

    def rule(x: Tensor) -> Any:
        calls.append(x)
        return NotImplemented

    program = graphopt.capture(nn.Sequential(nn.ReLU(), nn.ReLU()), (torch.ones(2, 3),))
    (relu,) = {n.target for n in program.export().graph.nodes if "relu" in str(n.target)}
    got = decomposed(program.export(), {relu: rule})
    assert ops(got) == {str(relu): 2}
    assert len(calls) == 1  # two calls of one kind
