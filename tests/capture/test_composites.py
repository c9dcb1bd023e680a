import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.op_calls import calls_of, counted_ops
from helpers.together import in_groups
from helpers.transformers_nets import NETS, built
from torch import Tensor, nn

import graphopt
from graphopt.errors import GraphOptError

_X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
_W = torch.ones(8, 8)


def _added_twice(y: Tensor, x: Tensor) -> Tensor:
    first = y + 1
    y += x
    return first * y + y.sin_() * y


def _viewed_and_written(y: Tensor) -> Tensor:
    view = y[:, :3]
    y += 1
    return view * 2


CASES: dict[str, Callable[[Tensor], Any]] = {
    "reshape": lambda x: x.reshape(x.shape[0], -1, 2) + 1,
    "reshape of two open sizes": lambda x: x.reshape(x.shape[0] * x.shape[1], 8) + 1,
    "reshape behind a transposition": lambda x: x.transpose(1, 2).reshape(x.shape[0], 8, -1) + 1,
    "flatten": lambda x: x.transpose(0, 1).flatten(1) + 1,
    "unflatten": lambda x: x.unflatten(2, (4, 2)) + 1,
    "to": lambda x: x.to(torch.float64).to(torch.float64) + 1,
    "to what it is": lambda x: x.to(torch.float32) + 1,
    "contiguous": lambda x: x.contiguous() + x.transpose(1, 2).contiguous().sum(),
    "chunk": lambda x: sum(part * number for number, part in enumerate((x @ _W).chunk(4, 2))),
    "tensor_split": lambda x: (x @ _W).tensor_split(3, 2)[1] + 1,
    "constants of the code": lambda x: x * torch.tensor(2.0) + torch.tensor([1.0] * 8),
    "expand_as": lambda x: x[:, :1].expand_as(x) + 1,
    "type_as": lambda x: (x > 0).type_as(x) + 1,
    "squeeze and swap": lambda x: x.unsqueeze(1).squeeze().swapaxes(0, 1) + 1,
    "matrix transposed": lambda x: x.mT @ x,
    "movedim": lambda x: x.movedim(0, 2) + 1,
    "narrow": lambda x: x.narrow(2, 1, 3) + 1,
    "boolean operators": lambda x: (x > 0) & (x < 1) | ~(x > -1),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x, x, x),
    "indexing": lambda x: x[:, None, ..., 1:5:2] + x[:, torch.tensor([0, 2]), None, 1:5:2][:, :1],
    "diagonal": lambda x: x[..., :6].diagonal(dim1=1, dim2=2) + 1,
    "dropout": lambda x: nn.functional.dropout(x.reshape(-1, 8), 0.5, training=False) + 1,
    "in place on an own value": lambda x: (x * 2).add_(x).relu_().mul_(3) + 1,
    "in place on a value that is read again": lambda x: _added_twice(x * 2, x),
    "in place behind a cast": lambda x: (x > 0).to(torch.float32).add_(x > 1).sum(),
    "in place behind a view": lambda x: _viewed_and_written(x * 2),
    "in place on a view": lambda x: x.clone().reshape(-1, 8).add_(1).view(x.shape),
}


def _captured(
    model: nn.Module, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, *, by_torch: bool
) -> graphopt.Program:
    with monkeypatch.context() as patch:
        if by_torch:
            module = sys.modules["graphopt.capture.exporting"]
            patch.setattr(module, "break_up_composites", lambda exported, table: False)
        return graphopt.capture(model, args)


def _ops(program: graphopt.Program) -> Counter[str]:
    nodes = program.graph_module.graph.nodes
    called = [node for node in nodes if node.op == "call_function"]
    # a size is computed from others, or found by the op
    return Counter(str(node.target) for node in called if isinstance(node.meta.get("val"), Tensor))


def _check(model: nn.Module, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    by_torch = _captured(model, args, monkeypatch, by_torch=True)
    program = _captured(model, args, monkeypatch, by_torch=False)
    assert _ops(program) == _ops(by_torch)
    assert program.provenance.static_dims == by_torch.provenance.static_dims
    torch.testing.assert_close(program.module()(*args), model(*args))


class _Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize("name", CASES)
def test_composites_become_what_the_tracer_makes_of_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = _Net(CASES[name]).eval()
    _check(net, (_X,), monkeypatch)
    program = graphopt.capture(net, (_X,))
    torch.testing.assert_close(program.module()(_X[:3]), net(_X[:3]))


def test_most_programs_are_not_traced_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    real = torch.export.ExportedProgram.run_decompositions
    monkeypatch.setattr(
        torch.export.ExportedProgram,
        "run_decompositions",
        lambda *args, **kwargs: traced.append(1) or real(*args, **kwargs),
    )
    views = {"in place behind a view", "in place on a view"}
    for name in ("reshape", "flatten", "constants of the code", "in place on an own value"):
        graphopt.capture(_Net(CASES[name]).eval(), (_X,))
    assert not traced
    for name in views:
        graphopt.capture(_Net(CASES[name]).eval(), (_X,))
    assert len(traced) == len(views)


def test_a_program_that_is_given_keeps_its_graph() -> None:
    net = _Net(lambda x: (x * 2).add_(1).reshape(-1, 8)).eval()
    exported = torch.export.export(net, (_X,), strict=False)
    before = str(exported.graph)
    graphopt.capture(exported)
    assert str(exported.graph) == before
    torch.testing.assert_close(exported.module()(_X), net(_X))


def test_names_of_modules_stay_with_what_a_call_becomes() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Unflatten(2, (4, 2)), nn.Linear(2, 2)).eval()
    graph = graphopt.capture(model, (_X,)).graph_module.graph
    (view,) = [node for node in graph.nodes if str(node.target) == "aten.view.default"]
    assert [path for path, _ in view.meta["nn_module_stack"].values()][-1] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_networks_of_transformers_are_broken_up_alike(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, args = built(name)
    _check(model, args, monkeypatch)


# torch's second trace gives views of views as one view, or as another op
_OTHER_VIEWS = ("cartesian_prod",)


def _stays_whole(program: graphopt.Program) -> bool:
    """Whether an op is there whose derivative torch writes in Python, which replaces it in a second trace."""
    key = torch._C.DispatchKey.Autograd
    nodes = program.graph_module.graph.nodes
    return any(key in getattr(node.target, "py_kernels", {}) for node in nodes)


@pytest.mark.slow
@pytest.mark.parametrize("names", in_groups(counted_ops(), 12))
def test_calls_of_the_op_database_are_broken_up_alike(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        for call in calls_of(name):
            try:
                by_torch = _captured(call.module, call.inputs, monkeypatch, by_torch=True)
            except GraphOptError:
                continue
            program = _captured(call.module, call.inputs, monkeypatch, by_torch=False)
            if _stays_whole(program) or name in _OTHER_VIEWS:
                wanted = call.module(*call.inputs)
                torch.testing.assert_close(program.module()(*call.inputs), wanted)
                continue
            assert _ops(program) == _ops(by_torch), call.name
