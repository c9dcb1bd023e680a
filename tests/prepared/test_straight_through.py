"""Rounding with learned scales, against straight-through rounding that autograd differentiates."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt.fitting.moving import Moving, Rounding
from graphopt.numerics.affine import Grid
from graphopt.prepared.straight_through import learned_round
from graphopt.quantization import (
    ModuleQuantizerConfig,
    QuantizationSpec,
    Quantizer,
    QuantizerConfig,
)

INT8, INT4 = Grid("int8", 8, -128, 127), Grid("int4", 4, -8, 7)
UINT8 = Grid("uint8", 8, 0, 255)


def straight_through(x: Tensor, scale: Tensor, offset: Tensor, grid: Grid) -> Tensor:
    """Every step in float64, only the rounding replaced; what is clipped has no gradient."""
    raw = x / scale + offset
    passed = raw + (raw.round() - raw).detach()
    # not by clamp, whose gradient at an end itself is another one in later versions of torch
    whole = raw.detach().round()
    inside = (whole >= grid.q_min) & (whole <= grid.q_max)
    stored = torch.where(inside, passed, whole.clamp(grid.q_min, grid.q_max))
    return (stored - offset) * scale


def gradients(
    function: Callable[..., Tensor], up: Tensor, *given: Tensor
) -> tuple[Tensor, list[Tensor]]:
    leaves = [value.clone().requires_grad_() for value in given]
    made = function(*leaves)
    (made * up.to(made.dtype)).sum().backward()
    return made.detach().double(), [leaf.grad.double() for leaf in leaves if leaf.grad is not None]


def values(grid: Grid, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of which some elements are cut off, scales, and gradients of the results."""
    generator = torch.Generator().manual_seed(seed)
    x, up = torch.randn(3, 400, generator=generator), torch.randn(3, 400, generator=generator)
    return x, torch.tensor([0.8, 1.1, 1.7]) * 4.0 / (grid.q_max - grid.q_min), up


@pytest.mark.parametrize(
    ("grid", "offset"),
    [
        (INT8, -100.0),
        (INT8, -3.0),
        (INT8, 5.0),
        (INT4, -7.0),
        (INT4, -1.0),
        (UINT8, 131.0),
        (INT8, -2.6),
        (INT4, -1.5),
        (UINT8, 130.3),
    ],
)
def test_learned_scales_get_the_straight_through_gradient(grid: Grid, offset: float) -> None:
    x, scale, up = values(grid)
    offsets, whole = torch.full((3,), offset), offset == round(offset)
    found, got = gradients(
        lambda x, scale: learned_round(x, scale, offsets, grid, whole=whole), up, x, scale
    )
    wide = offsets.double()[:, None]
    wanted, want = gradients(
        lambda x, scale: straight_through(x, scale[:, None], wide, grid),
        up,
        x.double(),
        scale.double(),
    )
    want[1] /= math.sqrt(400 * grid.q_max)  # LSQ's factor, arXiv 1902.08153, section 2.2
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero", [-120.0, -3.0, 0.0, 64.0])
@pytest.mark.parametrize("axis", [None, 0])
def test_tuned_ranges_get_the_straight_through_gradient(zero: float, axis: int | None) -> None:
    x, scale, up = values(INT8)
    shape, scale = ((), scale[0]) if axis is None else ((3,), scale)
    moving = (
        Moving(scale, 1.0, factor=True),
        Moving(torch.full(shape, zero), 1.0, limits=(-128, 127)),
    )
    part = Rounding("x", (-128, 127), *moving, axis, [])
    data = x.clone().requires_grad_()
    made = part.round(data)
    (made * up).sum().backward()

    def reference(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        wide = (scale, offset) if axis is None else (scale[:, None], offset[:, None])
        return straight_through(x, *wide, INT8)

    given = x.double(), scale.double(), torch.full(shape, zero).double()
    wanted, want = gradients(reference, up, *given)
    got = [data.grad, part.scale.v.grad, part.zero.v.grad]
    want[1] *= scale.double()  # scales move as factors
    torch.testing.assert_close(made.detach().double(), wanted, rtol=1e-5, atol=1e-6)
    for one, other in zip(got, want, strict=True):
        assert one is not None
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_negative_scales_count_by_their_magnitude() -> None:
    x, scale, _ = values(INT4)
    zero = torch.full((3,), -2.0)
    wanted = learned_round(x, scale, zero, INT4)
    torch.testing.assert_close(learned_round(x, -scale, zero, INT4), wanted)


def test_training_with_fractional_offsets_sees_what_the_program_will_compute() -> None:
    torch.manual_seed(0)
    spec = QuantizationSpec(
        dtype="int4", qscheme="asymmetric", qformulation="minval", fake_quantize_cls="lsq"
    )
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(
            op_input_spec=None, op_output_spec=None, op_state_spec={"weight": spec}
        )
    )
    x, model = torch.randn(8, 16), nn.Linear(16, 4)
    quantizer = Quantizer(model, config)
    prepared = quantizer.prepare((x,))
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-2)
    with quantizer.training_mode():
        for _ in range(3):
            optimizer.zero_grad()
            prepared(x).square().sum().backward()
            optimizer.step()
        trained = prepared(x).detach()
    torch.testing.assert_close(
        quantizer.finalize(backend="torch")(x), trained, rtol=1e-4, atol=1e-5
    )
