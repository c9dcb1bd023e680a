from __future__ import annotations

import pytest
import torch

from graphopt.numerics.finite import all_finite

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_no_number_is_found_wherever_it_is(
    dtype: torch.dtype, bad: float
) -> None:
    values = torch.linspace(-3, 3, 30).reshape(2, 5, 3)
    assert all_finite(values.to(dtype))
    for place in (0, 13, 29):
        broken = values.clone()
        broken.view(-1)[place] = bad
        assert not all_finite(broken.to(dtype))


def test_integers_and_nothing_are_finite() -> None:
    assert all_finite(torch.arange(3))
    assert all_finite(torch.empty(0, 4))
