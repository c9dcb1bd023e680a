from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt.ir.recording import NotRecordableError, recorded

X = torch.linspace(-1, 1, 6).reshape(2, 3)


def call_of(module: nn.Module) -> fx.Node:
    """The one call of a program."""
    exported = graphopt.capture(module, (X,), dynamic_shapes=None).export()
    (call,) = (node for node in exported.graph.nodes if node.op == "call_function")
    return call


def ops_of(call: fx.Node, table: dict[Any, Callable[..., Any]]) -> list[str]:
    body = recorded(call, table)
    assert body is not None
    return [str(node.target) for node in body.calls()]


def test_composite_op_is_broken_up_where_the_table_names_it() -> None:
    call = call_of(nn.Linear(3, 4))
    table = torch.export.default_decompositions()
    assert ops_of(call, {call.target: table[call.target]}) == [
        "aten.t.default",
        "aten.addmm.default",
    ]


def test_composite_ops_inside_a_rule_stay_whole() -> None:
    call = call_of(nn.ReLU())

    def rule(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, x) + 1.0

    assert ops_of(call, {call.target: rule}) == ["aten.linear.default", "aten.add.Tensor"]


def test_values_of_a_body_have_the_sizes_of_the_call() -> None:
    call = call_of(nn.ReLU())
    body = recorded(call, {call.target: lambda x: x.clamp(min=0)})
    assert body is not None
    assert [tuple(node.meta["val"].shape) for node in body.calls()] == [(2, 3)]


def test_operands_that_are_described_by_one_tensor_are_two() -> None:
    class Difference(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x - y

    exported = graphopt.capture(Difference(), (X, X + 1), dynamic_shapes=None).export()
    (call,) = (node for node in exported.graph.nodes if node.op == "call_function")
    first, second = call.all_input_nodes
    second.meta["val"] = first.meta["val"]
    body = recorded(call, {call.target: lambda x, y: x + (-y)})
    assert body is not None
    negated, added = body.calls()
    assert negated.args == (body.given[1],)
    assert added.args == (body.given[0], negated)


@pytest.mark.parametrize(
    "rule",
    [lambda x: x.clone().add_(1.0), lambda x: x + torch.tensor([1.0, 2.0, 3.0])],
    ids=["writes", "tensor of its own"],
)
def test_what_writes_or_makes_tensors_of_its_own_is_not_recorded(
    rule: Callable[[Tensor], Tensor],
) -> None:
    call = call_of(nn.ReLU())
    with pytest.raises(NotRecordableError):
        recorded(call, {call.target: rule})


def test_recording_warns_of_nothing_and_leaves_torch_its_kernels() -> None:
    call, enabled = call_of(nn.ReLU()), torch.backends.mkldnn.is_available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops_of(call, {call.target: lambda x: x.clamp(min=0)}) == ["aten.clamp.default"]
    assert torch.backends.mkldnn.enabled == enabled
