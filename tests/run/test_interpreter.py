from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt.ir.captured_module import CapturedModule
from graphopt.run.batches import Batch
from graphopt.run.interpreter import Hooks, Interpreter, constant_value

_aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.rand(6, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x).relu()
        mixed = hidden @ (self.scale * 2)
        return self.second(hidden), mixed + x


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        return self.fc(x)


def captured(model: nn.Module) -> CapturedModule:
    return graphopt.capture(model.eval(), (torch.randn(2, 4),)).graph_module


def calls(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=target))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.linspace(-1, 1, 12).reshape(3, 4)
BATCH: Batch = ((X,), {})


@torch.no_grad()
def test_a_run_computes_what_the_module_computes(net: Net) -> None:
    got = Interpreter(captured(net)).run(BATCH)
    for left, right in zip(got, net(X), strict=True):
        torch.testing.assert_close(left, right)


@torch.no_grad()
def test_a_hook_behind_a_node_changes_what_its_readers_see(net: Net) -> None:
    gm = captured(net)
    (relu,) = calls(gm, _aten.relu.default)
    first, _ = Interpreter(gm).run(BATCH, {relu: lambda value: value + 1})
    torch.testing.assert_close(first, net.second(net.first(X).relu() + 1))


@torch.no_grad()
def test_a_hook_behind_an_input_changes_what_the_graph_sees(net: Net) -> None:
    gm = captured(net)
    (x,) = gm.graph.find_nodes(op="placeholder")
    _, mixed = Interpreter(gm).run(BATCH, {x: lambda value: value * 2})
    torch.testing.assert_close(mixed, net(X * 2)[1])


@torch.no_grad()
def test_a_hook_before_an_op_changes_its_data_for_that_op_alone(net: Net) -> None:
    gm = captured(net)
    interpreter = Interpreter(gm)
    _, second = calls(gm, _aten.linear.default)
    values = interpreter.inputs(BATCH)
    nodes = [node for node in interpreter.nodes if node.op not in ("placeholder", "output")]
    interpreter.walk(nodes, values, hooks=Hooks(before={second: lambda value: value * 3}))
    first, mixed = (values[node] for node in interpreter.results())
    torch.testing.assert_close(first, net.second(net.first(X).relu() * 3))
    torch.testing.assert_close(mixed, net(X)[1])


@torch.no_grad()
def test_values_that_are_computed_elsewhere_are_asked_for_and_dropped_ones_are_gone(
    net: Net,
) -> None:
    gm = captured(net)
    interpreter = Interpreter(gm)
    (relu,) = calls(gm, _aten.relu.default)
    _, second = calls(gm, _aten.linear.default)
    hidden = torch.rand(3, 6)
    values: dict[fx.Node, Any] = {relu: hidden}
    asked = []

    def outside(node: fx.Node) -> Any:
        asked.append(node)
        return constant_value(gm, node)

    interpreter.walk([second], values, outside=outside, last={relu: second}, kept={second})
    assert list(values) == [second]
    torch.testing.assert_close(values[second], net.second(hidden))
    assert [str(node.target) for node in asked] == ["second.weight", "second.bias"]


@torch.no_grad()
def test_values_live_until_their_last_reader_has_run(net: Net) -> None:
    gm = captured(net)
    interpreter = Interpreter(gm)
    values = interpreter.inputs(BATCH)
    nodes = [node for node in interpreter.nodes if node.op not in ("placeholder", "output")]
    for number, node in enumerate(nodes):
        interpreter.walk([node], values, last=interpreter.last)
        rest = {*nodes[number + 1 :], interpreter.output}
        assert all(rest & set(held.users) for held in values)
    assert set(values) == set(interpreter.results())


def test_what_depends_on_constants_alone_is_constant(net: Net) -> None:
    gm = captured(net)
    interpreter = Interpreter(gm)
    (scaled,) = calls(gm, _aten.mul.Tensor)
    assert scaled in interpreter.constant
    assert interpreter.output not in interpreter.constant
    assert not interpreter.constant & set(calls(gm, _aten.linear.default))
    torch.testing.assert_close(constant_value(gm, scaled), net.scale.detach() * 2)
    assert not constant_value(gm, scaled).requires_grad


@pytest.mark.integration
@torch.no_grad()
@pytest.mark.parametrize("copies", [False, True])
def test_a_graph_that_writes_into_its_input_leaves_the_batch_as_it_is(copies: bool) -> None:
    model = Counting()
    interpreter = Interpreter(captured(model), copies=copies)
    given = X.clone()
    for _ in range(2):
        (got,) = interpreter.run(((given,), {}))
        torch.testing.assert_close(got, model.fc(X + 1))
    assert torch.equal(given, X)


@torch.no_grad()
def test_with_copies_a_node_that_writes_may_run_twice(net: Net) -> None:
    gm = captured(net)
    (relu,) = calls(gm, _aten.relu.default)
    with gm.graph.inserting_after(relu):
        adds = gm.graph.call_function(_aten.add_.Tensor, (relu, 1))
    hidden = torch.rand(3, 6)
    once = Interpreter(gm)
    again = Interpreter(gm, copies=True)
    for _ in range(2):
        got = again.call(adds, {relu: hidden.clone()}.__getitem__)
        torch.testing.assert_close(got, hidden + 1)
    values = {relu: hidden.clone()}
    again.walk([adds], values)
    torch.testing.assert_close(values[relu], hidden)
    once.walk([adds], values)
    torch.testing.assert_close(values[relu], hidden + 1)


def test_gradients_arrive_at_a_value_that_a_hook_made_a_leaf(net: Net) -> None:
    gm = captured(net)
    (relu,) = calls(gm, _aten.relu.default)
    leaves: list[Tensor] = []

    def cut(value: Tensor) -> Tensor:
        leaves.append(value.detach().requires_grad_())
        return leaves[0]

    first, _ = Interpreter(gm).run(BATCH, {relu: cut})
    (found,) = torch.autograd.grad(first.sum(), leaves)
    expected = net.second.weight.detach().sum(0).expand(3, -1)
    torch.testing.assert_close(found, expected)
