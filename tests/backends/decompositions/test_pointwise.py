"""Elementwise ops in simpler ones, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graphopt.backends.decompositions import pointwise


@pytest.mark.parametrize("rule", [pointwise.log1p, pointwise.expm1], ids=["log1p", "expm1"])
def test_small_values_are_not_rounded_away(rule: Callable[[Tensor], Tensor]) -> None:
    sizes = torch.logspace(-30, 1, 2000, base=10.0)
    x = torch.cat([sizes, -sizes[sizes < 0.9]])
    want = getattr(torch, rule.__name__)(x.double())
    assert ((rule(x).double() - want) / want).abs().max() < 1e-5
