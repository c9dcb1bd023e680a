"""Quantization against a layer's outputs: brute force, closed forms, and every layout of scales."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

import graphopt
from graphopt.analysis.matrix_form import WeightUse, weight_uses
from graphopt.analysis.weights import find_weights
from graphopt.errors import CompressionError
from graphopt.fitting.output_loss import OutputLoss
from graphopt.fitting.quantize_outputs import (
    best_scale,
    grid_values,
    quantize_to_outputs,
    search_scales,
    table_map,
)
from graphopt.numerics.blocks import Blocks
from graphopt.schemes.quantize import QuantizedWeight, plan_blocks, quantize_weight
from graphopt.specs import (
    PerBlockGranularity,
    PerChannelGranularity,
    PerGroupedChannelGranularity,
    PerTensorGranularity,
    QuantizationFormulation,
    QuantizationScheme,
    QuantizationSpec,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CHANNELS = PerChannelGranularity()
ASYMMETRIC = QuantizationScheme.ASYMMETRIC


def use_of(module: nn.Module, *shape: int) -> WeightUse:
    program = graphopt.capture(module.eval(), (torch.randn(*shape),))
    (weight,) = (w for w in find_weights(program.graph_module) if w.tensor.ndim > 1)
    (use,) = weight_uses(program.graph_module, [weight])[weight.name]
    return use


def moments(groups: int, columns: int, seed: int = 0) -> Tensor:
    """Second moments of correlated inputs, [groups, columns, columns]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 6 * columns, columns, generator=generator)
    x = x @ torch.randn(groups, columns, columns, generator=generator)
    return x.mT @ x / x.shape[1]


def loss(weight: Tensor, dense: Tensor, use: WeightUse, hessian: Tensor) -> float:
    gap = use.matrix(weight - dense, casts=False).double()
    return float(((gap @ hessian.double()) * gap).sum())


def elements_of(form: QuantizedWeight) -> Tensor:
    """Stored values, from the dense weight and the scales."""
    scale = form.blocks.spread(form.scale.float())
    offset = 0.0 if form.offset is None else form.blocks.spread(form.offset.float())
    return form.dense() / scale + offset


def test_codes_are_near_the_best_of_all_roundings() -> None:
    """Every assignment of 2-bit integers to a row of six weights is tried."""
    use, ratios, nearest = use_of(nn.Linear(6, 1, bias=False), 2, 6), [], []
    spec = QuantizationSpec(dtype="int2", granularity=CHANNELS)
    values = grid_values(spec)
    every = torch.tensor(list(itertools.product(values.tolist(), repeat=6)))
    for seed in range(40):
        hessian = moments(1, 6, seed)
        weight = torch.randn(1, 6, generator=torch.Generator().manual_seed(seed))
        scale = torch.full((1, 1), 0.6)
        blocks = Blocks.along((1, 6), 0, 1)
        found = quantize_to_outputs(
            weight,
            spec,
            blocks,
            OutputLoss(use, hessian, damping=1e-4),
            scales=(scale, None),
            move_scales=False,
        )
        assert found is not None
        gaps = (weight - scale * every).double()
        best = float(torch.einsum("ni,ij,nj->n", gaps, hessian[0].double(), gaps).min())
        plain = quantize_weight(weight, spec, blocks, fixed=(scale, None))
        reached = loss(weight, found.dense(), use, hessian)
        assert reached >= best * (1 - 1e-5)
        ratios.append(reached / best)
        nearest.append(loss(weight, plain.dense(), use, hessian) / best)
    assert np.mean(ratios) < 1.5
    assert np.mean(nearest) > 2 * np.mean(ratios)
    assert np.median(ratios) < 1.05


def test_codes_are_the_nearest_where_inputs_are_not_correlated() -> None:
    use = use_of(nn.Linear(6, 3, bias=False), 2, 6)
    spec, blocks = QuantizationSpec(dtype="int3", granularity=CHANNELS), Blocks.along((3, 6), 0, 1)
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    scales = (torch.full((3, 1), 0.4), None)
    hessian = torch.diag(torch.rand(6) + 0.1)[None]
    found = quantize_to_outputs(
        weight, spec, blocks, OutputLoss(use, hessian), scales=scales, move_scales=False
    )
    assert found is not None
    nearest = quantize_weight(weight, spec, blocks, fixed=scales)
    torch.testing.assert_close(found.dense(), nearest.dense())


def test_scale_of_given_elements_is_the_minimum_of_the_error() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 8, generator=generator)
    elements = torch.randint(-4, 4, (3, 8), generator=generator).float()
    hessian = moments(1, 8)[0]
    apart = best_scale(weight, elements, hessian, torch.ones(3), np.arange(3))
    shared = best_scale(weight, elements, hessian, torch.ones(1), np.zeros(3, np.int64))

    def error(scale: float, rows: slice) -> float:
        gap = (weight.double() - scale * elements.double())[rows]
        return float(torch.einsum("ri,ij,rj->", gap, hessian.double(), gap))

    for row in range(3):
        best = minimize_scalar(lambda s, row=row: error(s, slice(row, row + 1))).x
        if best > 0:
            assert float(apart[row]) == pytest.approx(best, rel=1e-4)
    assert float(shared[0]) == pytest.approx(
        minimize_scalar(lambda s: error(s, slice(3))).x, rel=1e-4
    )


def test_scale_that_would_not_be_positive_keeps_its_value() -> None:
    weight, hessian = torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.eye(2)
    elements = torch.tensor([[-1.0, -1.0], [0.0, 0.0]])
    found = best_scale(weight, elements, hessian, torch.tensor([0.3, 0.7]), np.arange(2))
    torch.testing.assert_close(found, torch.tensor([0.3, 0.7]))


LAYERS = {
    "linear": (nn.Linear(16, 12, bias=False), (2, 16), 1),
    "convolution": (nn.Conv2d(4, 8, 3, bias=False), (2, 4, 8, 8), 1),
    "grouped convolution": (nn.Conv2d(8, 8, 3, groups=2, bias=False), (2, 8, 8, 8), 2),
    "transposed convolution": (nn.ConvTranspose2d(6, 4, 2, bias=False), (2, 6, 8, 8), 1),
}
SPECS = {
    "channels": QuantizationSpec(dtype="int4", granularity=CHANNELS),
    "channels, zero points": QuantizationSpec(
        dtype="int4", granularity=CHANNELS, qscheme=ASYMMETRIC
    ),
    "unsigned": QuantizationSpec(dtype="uint3", granularity=CHANNELS, qscheme=ASYMMETRIC),
    "one scale": QuantizationSpec(dtype="int3", granularity=PerTensorGranularity()),
    "groups of channels": QuantizationSpec(
        dtype="int4", granularity=PerGroupedChannelGranularity(group_size=2)
    ),
    "blocks of inputs": QuantizationSpec(
        dtype="int4", granularity=PerBlockGranularity(block_size=2)
    ),
    "minimum": QuantizationSpec(
        dtype="int4",
        granularity=CHANNELS,
        qscheme=ASYMMETRIC,
        qformulation=QuantizationFormulation.MINVAL,
    ),
    "half-precision scales": QuantizationSpec(
        dtype="int4", granularity=CHANNELS, scale_dtype="float16"
    ),
    "fp8": QuantizationSpec(dtype="fp8_e4m3", granularity=CHANNELS),
    "fp4": QuantizationSpec(dtype="fp4_e2m1", granularity=CHANNELS),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", SPECS)
def test_outputs_are_closer_than_with_the_nearest_values(name: str, kind: str) -> None:
    module, shape, groups = LAYERS[kind]
    spec = SPECS[name]
    use = use_of(module, *shape)
    weight = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(3))
    hessian = moments(groups, use.matrix(weight).shape[2])
    axis = 1 if kind.startswith("transposed") else 0
    blocks, _ = plan_blocks(weight.shape, axis, spec.granularity)
    found = quantize_to_outputs(weight, spec, blocks, OutputLoss(use, hessian))
    assert found is not None
    plain = quantize_weight(weight, spec, blocks)
    assert loss(weight, found.dense(), use, hessian) < 0.8 * loss(
        weight, plain.dense(), use, hessian
    )
    assert found.scale.dtype == plain.scale.dtype
    values = grid_values(spec)
    distance = (elements_of(found)[..., None] - values).abs().amin(-1)
    assert float(distance.max()) < 1e-3


def test_searched_ranges_weigh_errors_by_the_inputs() -> None:
    """An outlier that meets no input costs nothing, so the range leaves it out."""
    use = use_of(nn.Linear(8, 1, bias=False), 2, 8)
    weight = torch.tensor([[0.1, -0.2, 0.3, -0.4, 0.35, 0.25, -0.15, 8.0]])
    spec = QuantizationSpec(dtype="int4", granularity=CHANNELS)
    blocks = Blocks.along((1, 8), 0, 1)
    seen = torch.diag(torch.tensor([1.0] * 7 + [0.0]))[None]
    narrow, _ = search_scales(weight, spec, blocks, use, seen)
    wide, _ = search_scales(weight, spec, blocks, use, torch.eye(8)[None])
    assert float(narrow) < 0.4 * float(wide)
    assert float(wide) == pytest.approx(8 / 7, rel=0.2)


def test_half_ranges_keep_their_zero_points() -> None:
    use = use_of(nn.Linear(32, 4, bias=False), 2, 32)
    weight = torch.rand(4, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    hessian = moments(1, 32)
    errors = []
    for scheme in (QuantizationScheme.SYMMETRIC, ASYMMETRIC):
        spec = QuantizationSpec(dtype="int4", granularity=CHANNELS, qscheme=scheme)
        found = quantize_to_outputs(
            weight, spec, Blocks.along((4, 32), 0, 1), OutputLoss(use, hessian)
        )
        assert found is not None
        errors.append(loss(weight, found.dense(), use, hessian))
    assert errors[1] < 0.5 * errors[0]


class PartOfWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:4])


def test_a_weight_of_which_the_op_sees_a_part_is_left_to_others() -> None:
    use = use_of(PartOfWeight(), 2, 6)
    blocks = Blocks.along((8, 6), 0, 1)
    spec = QuantizationSpec(dtype="int4", granularity=CHANNELS)
    assert table_map(use, blocks) is None
    assert (
        quantize_to_outputs(torch.randn(8, 6), spec, blocks, OutputLoss(use, moments(1, 6))) is None
    )


def test_weights_that_are_no_numbers_are_refused() -> None:
    use = use_of(nn.Linear(4, 2, bias=False), 2, 4)
    weight = torch.full((2, 4), float("nan"))
    spec = QuantizationSpec(dtype="int4", granularity=CHANNELS)
    with pytest.raises(CompressionError, match="NaN"):
        quantize_to_outputs(
            weight, spec, Blocks.along((2, 4), 0, 1), OutputLoss(use, torch.eye(4)[None])
        )


def test_rows_of_zeros_stay_zero() -> None:
    use = use_of(nn.Linear(8, 3, bias=False), 2, 8)
    weight = torch.randn(3, 8)
    weight[1] = 0
    spec = QuantizationSpec(dtype="int3", granularity=CHANNELS)
    found = quantize_to_outputs(
        weight, spec, Blocks.along((3, 8), 0, 1), OutputLoss(use, moments(1, 8))
    )
    assert found is not None
    assert not bool(found.dense()[1].any())
    assert bool(torch.isfinite(found.dense()).all())
