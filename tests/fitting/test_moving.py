"""What tuning moves: scales, zero points and integers, their gradients and limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.fitting.moving import Moving, Rounding, straight_through

ENDS = (-128, 127)


def rounding(scale: Tensor, zero: Tensor, axis: int | None = None) -> Rounding:
    moving = Moving(scale, 1.0, factor=True), Moving(zero, 1.0, limits=ENDS)
    return Rounding("x", ENDS, *moving, axis, [])


@pytest.mark.parametrize("zero", [-100.0, -3.0, 0.0, 7.0, 127.0])
def test_values_are_those_of_the_quantize_ops(zero: float) -> None:
    x, scale = torch.randn(500, generator=torch.Generator().manual_seed(0)), 0.0117
    found = rounding(torch.tensor(scale), torch.tensor(zero)).round(x)
    wanted = torch.fake_quantize_per_tensor_affine(x, scale, int(zero), *ENDS)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("axis", [None, 1])
def test_gradients_are_those_of_lsq(axis: int | None) -> None:
    """arXiv 1902.08153, equation 3, and 2004.09576, equation 4, by hand."""
    generator = torch.Generator().manual_seed(0)
    x, up = torch.randn(40, 3, generator=generator), torch.randn(40, 3, generator=generator)
    shape = () if axis is None else (3,)
    scale, zero = torch.full(shape, 0.012), torch.full(shape, -77.0)
    part = rounding(scale, zero, axis)
    data = x.clone().requires_grad_()
    (part.round(data) * up).sum().backward()
    raw = x / scale + zero
    inside = (raw.round() >= ENDS[0]) & (raw.round() <= ENDS[1])
    of_scale = torch.where(inside, raw.round() - raw, raw.clamp(*ENDS) - zero) * up * scale
    of_zero = torch.where(inside, torch.zeros_like(x), -scale * torch.ones_like(x)) * up
    assert not bool(inside.all())
    over = (0, 1) if axis is None else (0,)
    torch.testing.assert_close(data.grad, up * inside)
    torch.testing.assert_close(part.scale.v.grad, of_scale.sum(over), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.zero.v.grad, of_zero.sum(over), rtol=1e-4, atol=1e-5)


def test_scales_stay_positive_and_zero_points_integers_on_the_grid() -> None:
    scale = Moving(torch.tensor([0.1, 2.0]), 1.0, factor=True)
    zero = Moving(torch.tensor([3.0, -128.0]), 1.0, limits=ENDS)
    for value in (-1e4, 0.4, 1.3, 1e3):
        scale.v.data.fill_(min(value, 50.0))
        zero.v.data.fill_(value)
        assert bool((scale.now() > 0).all() and scale.now().isfinite().all())
        found = zero.now().detach()
        assert torch.equal(found, found.round())
        assert float(found.min()) >= ENDS[0]
        assert float(found.max()) <= ENDS[1]


def test_what_has_no_unit_stays() -> None:
    fixed = Moving(torch.tensor(0.5), 0.0, factor=True)
    assert not fixed.v.requires_grad
    assert float(fixed.now()) == 0.5


def test_gradients_pass_what_has_none_of_its_own() -> None:
    values = torch.tensor([0.2, -1.7], requires_grad=True)
    made = straight_through(values, values.detach().round())
    made.backward(torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(made, torch.tensor([0.0, -2.0]))
    torch.testing.assert_close(values.grad, torch.tensor([2.0, 3.0]))
