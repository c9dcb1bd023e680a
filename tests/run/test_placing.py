"""Graphs on a device: tensors and the calls that name one, and all back as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.ir.captured_module import CapturedModule
from graphopt.run.batches import StatefulCall
from graphopt.run.placing import batch_on, device_of_graph, placed

META = torch.device("meta")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.shift + torch.zeros(4, device=x.device)


@pytest.fixture
def gm() -> CapturedModule:
    return graphopt.capture(Tied().eval(), (torch.zeros(2, 4),)).graph_module


def named_devices(gm: CapturedModule) -> set[torch.device]:
    return {
        value
        for node in gm.graph.nodes
        for value in node.kwargs.values()
        if isinstance(value, torch.device)
    }


def held(gm: CapturedModule) -> dict[str, Tensor]:
    return {
        **dict(gm.named_parameters(remove_duplicate=False)),
        **dict(gm.named_buffers(remove_duplicate=False)),
    }


def test_tensors_and_named_devices_move_and_come_back(gm: CapturedModule) -> None:
    before, code = held(gm), str(gm.graph)
    assert named_devices(gm) == {torch.device("cpu")}
    with placed(gm, META):
        assert {tensor.device for tensor in held(gm).values()} == {META} == named_devices(gm)
        assert device_of_graph(gm) == META
        names = [name for name in before if before[name] is gm.first.weight or "weight" in name]
        assert len({id(held(gm)[name]) for name in names}) == 1  # tied ones stay so
    assert str(gm.graph) == code
    assert all(tensor is before[name] for name, tensor in held(gm).items())


def test_tensors_that_were_replaced_stay_replaced(gm: CapturedModule) -> None:
    before = held(gm)
    with placed(gm, META):
        gm._buffers["shift"] = torch.full((4,), 2.0)
    assert torch.equal(gm.shift, torch.full((4,), 2.0))
    assert gm.first.weight is before["first.weight"]


def test_an_error_inside_brings_everything_back(gm: CapturedModule) -> None:
    before = held(gm)
    with pytest.raises(RuntimeError, match="inside"), placed(gm, META):
        raise RuntimeError("inside")
    assert all(tensor is before[name] for name, tensor in held(gm).items())


def test_no_device_leaves_everything(gm: CapturedModule) -> None:
    before = held(gm)
    with placed(gm, None):
        assert all(tensor is before[name] for name, tensor in held(gm).items())


def test_inputs_and_the_state_of_a_call_move() -> None:
    x = torch.zeros(2)
    args, kwargs = batch_on(((x, 3), {"y": [x]}), META)
    assert (args[0].device, args[1], kwargs["y"][0].device) == (META, 3, META)
    call: Any = batch_on(StatefulCall(((x,), {}), {"cache": x}), META)
    assert isinstance(call, StatefulCall)
    assert (call[0][0].device, call.state["cache"].device) == (META, META)
    assert batch_on(call, None) is call
