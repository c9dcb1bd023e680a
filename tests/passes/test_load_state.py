"""LoadState puts values where their names are, all or none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import InputError
from graphopt.passes import LoadState


def _program(seed: int) -> graphopt.Program:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    return graphopt.capture(model, (torch.ones(2, 4),))


def test_values_are_taken_by_name() -> None:
    source, program = _program(0), _program(1)
    LoadState(source.graph_module.state_dict())(program.graph_module)
    x = torch.randn(2, 4)
    assert torch.equal(program.module()(x), source.module()(x))


def test_nothing_is_taken_where_something_does_not_fit() -> None:
    program = _program(1)
    before = {name: value.clone() for name, value in program.graph_module.state_dict().items()}
    state = {**_program(0).graph_module.state_dict(), "0.weight": torch.zeros(4, 5)}
    with pytest.raises(InputError, match=r"0\.weight: \(4, 5\), the model has \(4, 4\)"):
        LoadState(state)(program.graph_module)
    for name, value in program.graph_module.state_dict().items():
        assert torch.equal(value, before[name])
