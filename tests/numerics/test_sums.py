from __future__ import annotations

import pytest
import torch

from graphopt.numerics.sums import sum_of_squares


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 1_000_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_sum_of_squares_is_that_of_float64(count: int, dtype: torch.dtype) -> None:
    x = (torch.randn(count, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    assert sum_of_squares(x) == pytest.approx(float(x.double().square().sum()), rel=1e-6)


def test_layout_and_gradients_do_not_matter() -> None:
    x = torch.randn(3, 5, 7, requires_grad=True).transpose(0, 2)
    assert sum_of_squares(x) == pytest.approx(float(x.detach().double().square().sum()), rel=1e-6)
