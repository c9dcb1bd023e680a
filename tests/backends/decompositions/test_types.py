"""Tensors of several types side by side, and angles on the axes, as in torch."""

from __future__ import annotations

import itertools

import pytest
import torch

from graphopt.backends.decompositions import pointwise, types

KINDS = (torch.bool, torch.int32, torch.int64, torch.float16, torch.float32)


@pytest.mark.parametrize("name", types.JOINS)
def test_tensors_are_joined_in_the_type_of_the_result(name: str) -> None:
    op = getattr(torch.ops.aten, name).default
    rule = types.joins_of_one_type(torch.ops.aten)[op]
    for kinds in itertools.product(KINDS, repeat=2):
        tensors = [torch.ones(2, 3).to(kind) for kind in kinds]
        made = rule(tensors)
        if kinds[0] is kinds[1]:
            assert made is NotImplemented
        else:
            torch.testing.assert_close(made, op(tensors), rtol=0, atol=0)


def test_angles_are_those_of_torch_on_the_axes_and_where_nothing_is_known() -> None:
    sides = torch.tensor([0.0, 1.0, -1.0, 2.5, -0.3, torch.inf, torch.nan])
    y, x = (grid.flatten() for grid in torch.meshgrid(sides, sides, indexing="ij"))
    both = y.isinf() & x.isinf()
    wanted = torch.atan2(y, x)
    torch.testing.assert_close(
        pointwise.atan2(y, x)[~both], wanted[~both], equal_nan=True, rtol=1e-6, atol=1e-7
    )
    whole = torch.arange(-2, 3)
    assert pointwise.atan2(whole, whole.flip(0)).dtype is torch.float32
