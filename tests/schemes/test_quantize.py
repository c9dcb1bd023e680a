"""Element types, scales and rounding, against formulas written out again and against peers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.errors import CompressionError
from graphopt.numerics.affine import grid_of, qparams, quantize
from graphopt.numerics.blocks import Blocks
from graphopt.numerics.clipping import clip_by_value
from graphopt.quantization import (
    QuantizationFormulation,
    QuantizationScheme,
    QuantizationSpec,
)
from graphopt.quantization.spec import (
    PerBlockGranularity,
    PerChannelGranularity,
    PerTensorGranularity,
)
from graphopt.schemes.quantize import plan_blocks, quantize_weight
from graphopt.specs import PerGroupedChannelGranularity

ASYMMETRIC = QuantizationScheme.ASYMMETRIC
DTYPES = ["int8", "uint8", "int6", "uint6", "int4", "uint4", "int3", "uint3", "int2", "uint2"]


def stored(spec: QuantizationSpec, weight: Tensor, output_axis: int = 0) -> tuple[Tensor, object]:
    blocks, _ = plan_blocks(weight.shape, output_axis, spec.granularity)
    quantized = quantize_weight(weight, spec, blocks)
    return quantized.dense(), quantized


@pytest.mark.parametrize("scheme", list(QuantizationScheme))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_is_within_half_a_step(dtype: str, scheme: QuantizationScheme) -> None:
    weight = torch.randn(6, 10)
    spec = QuantizationSpec(dtype=dtype, qscheme=scheme, granularity=PerChannelGranularity(axis=0))
    dense, quantized = stored(spec, weight)
    step = quantized.scale.expand(6, 10)  # type: ignore[attr-defined]
    # the zero point is an integer, which may cut up to half a step off an end
    limit = 1.001 if scheme is ASYMMETRIC else 0.5001
    assert ((dense - weight).abs() <= limit * step).all()
    levels = torch.unique((dense / step).round(decimals=3)[0])
    assert len(levels) <= 2 ** int(dtype.strip("uint"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_minimum_formulation_covers_the_range_exactly(dtype: str) -> None:
    weight = torch.rand(4, 64) + 3.0  # far from zero
    spec = QuantizationSpec(
        dtype=dtype, qscheme=ASYMMETRIC, qformulation=QuantizationFormulation.MINVAL
    )
    dense, quantized = stored(spec, weight)
    assert ((dense - weight).abs() <= 0.501 * float(quantized.scale)).all()  # type: ignore[attr-defined]


def test_symmetric_scale_clips_neither_end() -> None:
    low, high = torch.tensor([-1.0, -2.0]), torch.tensor([2.0, 1.0])
    scale, offset = qparams(low, high, QuantizationSpec())
    torch.testing.assert_close(scale, torch.tensor([2 / 127, 2 / 128]))
    assert offset is None


def test_clipping_scheme_drops_the_lowest_integer() -> None:
    spec = QuantizationSpec(qscheme=QuantizationScheme.SYMMETRIC_WITH_CLIPPING)
    scale, _ = qparams(torch.tensor([-2.0]), torch.tensor([1.0]), spec)
    torch.testing.assert_close(scale, torch.tensor([2 / 127]))
    assert quantize(torch.tensor([-2.0]), scale, None, grid_of(spec)).item() == -127


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_torchs_cast(name: str) -> None:
    weight = torch.randn(5, 33)
    spec = QuantizationSpec(dtype=name, granularity=PerChannelGranularity(axis=0))
    dense, _ = stored(spec, weight)
    kind = getattr(torch, name)
    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(kind).max
    torch.testing.assert_close(dense, (weight * (1 / scale)).to(kind).float() * scale)


def test_float4_is_the_nearest_of_its_sixteen_values() -> None:
    spec = QuantizationSpec(dtype="fp4_e2m1", granularity=PerBlockGranularity(block_size=32))
    weight = torch.randn(4, 64)
    dense, quantized = stored(spec, weight)
    scale = quantized.scale.float().repeat_interleave(32, 1)  # type: ignore[attr-defined]
    assert quantized.scale.dtype == torch.float8_e8m0fnu  # type: ignore[attr-defined]
    assert (torch.log2(scale) == torch.log2(scale).round()).all()
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([values, -values])
    nearest = (weight[..., None] / scale[..., None] - values).abs().amin(-1)
    torch.testing.assert_close((weight - dense).abs() / scale, nearest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_rounded_before_they_are_used(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 50).to(dtype)
    dense, quantized = stored(QuantizationSpec(), weight)
    assert dense.dtype == quantized.scale.dtype == dtype  # type: ignore[attr-defined]
    step = float(quantized.scale)  # type: ignore[attr-defined]
    rounding = torch.finfo(dtype).eps * weight.abs().float()
    assert ((dense.float() - weight.float()).abs() <= 0.5 * step + rounding + 1e-6).all()


def test_blocks_follow_the_documented_axes() -> None:
    conv, linear = (16, 8, 3, 3), (16, 64)
    cases = [
        (linear, 0, PerTensorGranularity(), (1, 1)),
        (linear, 0, PerChannelGranularity(), (16, 1)),
        (linear, 0, PerChannelGranularity(axis=-1), (1, 64)),
        (linear, 0, PerBlockGranularity(block_size=32), (16, 2)),
        (conv, 0, PerBlockGranularity(block_size=4), (16, 2, 1, 1)),
        (conv, 0, PerBlockGranularity(axis=0, block_size=4), (4, 8, 1, 1)),
        (conv, 1, PerBlockGranularity(block_size=4), (4, 8, 1, 1)),
        (conv, 0, PerBlockGranularity(block_size=(4, 2, 3, -1)), (4, 4, 1, 1)),
        (conv, 0, PerGroupedChannelGranularity(axis=0, group_size=4), (4, 1, 1, 1)),
        (conv, 1, PerChannelGranularity(), (1, 8, 1, 1)),
    ]
    for shape, axis, granularity, counts in cases:
        assert plan_blocks(shape, axis, granularity)[0].counts == counts, granularity


def test_size_that_does_not_divide_becomes_a_divisor_and_is_said() -> None:
    blocks, note = plan_blocks((4, 50), 0, PerBlockGranularity(block_size=32))
    assert blocks.counts == (4, 2)
    assert "do not divide" in note
    with pytest.raises(CompressionError, match="axis=3"):
        plan_blocks((4, 50), 0, PerChannelGranularity(axis=3))


def test_blocks_split_and_join() -> None:
    x = torch.randn(4, 6, 5)
    blocks = Blocks((4, 6, 5), (2, 3, 1))
    parts = blocks.split(x)
    assert parts.shape == (6, 20)
    torch.testing.assert_close(parts[1], x[:2, 2:4].reshape(-1))
    torch.testing.assert_close(blocks.join(parts), x)
    per_block = torch.arange(6.0).reshape(2, 3, 1)
    torch.testing.assert_close(
        blocks.split(blocks.spread(per_block).expand(4, 6, 5))[:, 0], torch.arange(6.0)
    )


@pytest.mark.parametrize("scheme", list(QuantizationScheme))
def test_least_squares_range_beats_the_full_one(scheme: QuantizationScheme) -> None:
    weight = torch.randn(8, 512)
    weight[:, 0] = 9.0
    per_channel = PerChannelGranularity(axis=0)
    plain = QuantizationSpec(dtype="int4", qscheme=scheme, granularity=per_channel)
    searched = plain.model_copy(update={"range_calculator_cls": "mse"})
    worse, better = stored(plain, weight)[1], stored(searched, weight)[1]
    assert better.sse < 0.8 * worse.sse  # type: ignore[attr-defined]
    low, high = clip_by_value(weight, searched)
    assert (high < 9.0).all()
    assert (low <= 0).all()


def test_weights_with_nan_are_refused() -> None:
    with pytest.raises(CompressionError, match="NaN"):
        stored(QuantizationSpec(), torch.tensor([[1.0, float("nan")]]))


def test_sizes_are_those_stored() -> None:
    weight = torch.randn(64, 128)
    spec = QuantizationSpec(dtype="int4", granularity=PerBlockGranularity(block_size=32))
    _, quantized = stored(spec, weight)
    assert quantized.stored_bits() == 64 * 128 * 4 + 64 * 4 * 32  # type: ignore[attr-defined]
