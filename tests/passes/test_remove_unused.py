"""RemoveUnused: what nothing reads goes."""

from __future__ import annotations

import torch
from helpers.linear_nets import X, ops
from torch import Tensor, nn

import graphopt
from graphopt.ir.editor import Editor
from graphopt.passes import (
    RemoveUnused,
)


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


def test_other_names_of_a_tensor_that_is_read_stay_on_request() -> None:
    gm = graphopt.capture(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval(), (X,)).graph_module
    first = gm.get_submodule("0")
    first.register_parameter("other", first.bias)
    assert not RemoveUnused(keep_tied=True)(gm).modified
    assert gm.get_parameter("0.other") is gm.get_parameter("0.bias")
    assert RemoveUnused()(gm).modified
    assert "0.other" not in gm.state_dict()


def test_bodies_of_control_flow_stay() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return torch.cond(y.sum() > 0, self.second, lambda z: -z, (y,))  # type: ignore[no-any-return]

    model = Conditional().eval()
    gm = graphopt.capture(model, (X,)).graph_module
    for keep_tied in (False, True):
        RemoveUnused(keep_tied=keep_tied)(gm)
        for x in (X, -X):
            torch.testing.assert_close(gm(x), model(x))
