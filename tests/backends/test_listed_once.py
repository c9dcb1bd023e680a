import pytest
import torch
from torch import nn
from torch._export import utils

import graphopt
from graphopt.backends.listed_once import composites_listed_once


def test_composite_ops_are_looked_up_once_and_tables_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = set(torch.export.default_decompositions().keys())
    looked_up = []
    look_up = utils._materialize_cpp_cia_ops
    monkeypatch.setattr(
        utils, "_materialize_cpp_cia_ops", lambda: (looked_up.append(1), look_up())[1]
    )
    with composites_listed_once():
        tables = [torch.export.default_decompositions() for _ in range(2)]
        assert [set(table.keys()) for table in tables] == [expected, expected]
    assert looked_up == [1]


def test_lowering_looks_them_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("coreai_torch")
    looked_up = []
    look_up = utils._materialize_cpp_cia_ops
    program = graphopt.capture(nn.Linear(3, 2), (torch.randn(2, 3),))
    monkeypatch.setattr(
        utils, "_materialize_cpp_cia_ops", lambda: (looked_up.append(1), look_up())[1]
    )
    graphopt.lower(program, "coreai")
    assert len(looked_up) <= 1


def test_torch_looks_up_as_before_afterwards() -> None:
    before = utils._materialize_cpp_cia_ops
    failing = composites_listed_once()
    with pytest.raises(RuntimeError, match="in between"), failing:
        raise RuntimeError("in between")
    assert utils._materialize_cpp_cia_ops is before
