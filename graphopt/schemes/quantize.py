"""Linear quantization: a weight becomes packed integers (or narrow floats) with block-wise scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import CompressionError
from graphopt.ir.ops import shift_scale
from graphopt.numerics.affine import dequantize, grid_of, has_whole_offsets, qparams, quantize
from graphopt.numerics.blocks import Blocks, nearest_divisor
from graphopt.numerics.clipping import clip_by_value
from graphopt.numerics.packing import pack
from graphopt.specs import (
    PerBlockGranularity,
    PerChannelGranularity,
    PerGroupedChannelGranularity,
    QuantizationFormulation,
    QuantizationGranularity,
    QuantizationSpec,
)

__all__ = [
    "QuantizedWeight",
    "plan_blocks",
    "quantize_weight",
    "scale_precision",
    "store_weight",
    "weight_range",
]

_FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def plan_blocks(
    shape: Sequence[int], output_axis: int, granularity: QuantizationGranularity
) -> tuple[Blocks, str]:
    """Divide a weight among scales.

    A scalar block size runs along the input channels (or `axis`); the other channel axis then has
    one block per channel, further axes one block. A size that does not divide its axis becomes the
    nearest divisor.

    Args:
        shape: Shape of the stored weight.
        output_axis: Its output-channel axis.
        granularity: What is asked for.

    Returns:
        The blocks, and what was changed against the request, or "".

    Raises:
        CompressionError: An axis does not exist, or block sizes do not match the rank.
    """
    dims = tuple(int(size) for size in shape)
    rank = len(dims)

    def checked(axis: int) -> int:
        if not -rank <= axis < rank:
            raise CompressionError(f"granularity.axis={axis}, but the tensor has shape {dims}")
        return axis % rank

    if isinstance(granularity, PerChannelGranularity):
        axis = output_axis if granularity.axis is None else checked(granularity.axis)
        return Blocks.along(dims, axis, 1), ""
    sizes = [*dims]
    if isinstance(granularity, PerGroupedChannelGranularity):
        axis = output_axis if granularity.axis is None else checked(granularity.axis)
        sizes[axis] = granularity.group_size
    elif isinstance(granularity, PerBlockGranularity):
        if isinstance(granularity.block_size, tuple):
            if len(granularity.block_size) != rank or granularity.axis is not None:
                raise CompressionError(
                    f"block_size={granularity.block_size} needs one size per axis of shape {dims},"
                    " and axis=None"
                )
            sizes = [
                dim if size == -1 else size
                for dim, size in zip(dims, granularity.block_size, strict=True)
            ]
        else:
            inputs = _input_axis(rank, output_axis)
            axis = inputs if granularity.axis is None else checked(granularity.axis)
            other = inputs if axis == output_axis else output_axis
            sizes[axis] = granularity.block_size
            if other != axis:
                sizes[other] = 1
    exact = [nearest_divisor(dim, min(size, dim)) for dim, size in zip(dims, sizes, strict=True)]
    note = ""
    if exact != sizes:
        note = f"blocks of {tuple(sizes)} do not divide {dims}; used {tuple(exact)}"
    return Blocks(dims, tuple(d // s for d, s in zip(dims, exact, strict=True))), note


def _input_axis(rank: int, output_axis: int) -> int:
    if rank == 1:
        return 0
    return 1 if output_axis == 0 else output_axis - 1


@dataclass(frozen=True)
class QuantizedWeight:
    """The stored form of one quantized weight: `dense = scale · (data − offset)` block-wise.

    Attributes:
        data: Packed elements, uint8 1-D (`graphopt.ops.shift_scale`).
        scale: One per block, shape `blocks.counts`.
        offset: Zero points (integer type) or fractional offsets (MINVAL) of that shape, or None.
        storage: Element type.
        blocks: Which elements share a scale.
        dtype: Type of the dense weight.
        sse: Sum of squared errors against the weight.
        energy: Sum of squares of the weight.
    """

    data: Tensor
    scale: Tensor
    offset: Tensor | None
    storage: str
    blocks: Blocks
    dtype: torch.dtype
    sse: float
    energy: float

    def dense(self) -> Tensor:
        """The weight as the compressed program computes it."""
        shape = list(self.blocks.shape)
        return shift_scale(self.data, self.scale, self.offset, self.storage, shape, self.dtype)

    def stored_bits(self) -> int:
        """Bits of data, scales and offsets."""
        tensors = [self.data, self.scale, *([] if self.offset is None else [self.offset])]
        return sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors)


def weight_range(
    weight: Tensor, spec: QuantizationSpec, blocks: Blocks, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Range of each block: its minimum and maximum, or those of least squared error.

    Args:
        weight: Any float tensor.
        spec: Element type, scheme and how ranges are found.
        blocks: From `plan_blocks`.
        importance: What each element's squared error counts, of the weight's shape; given, ranges
            of least error are searched whatever the spec says.

    Returns:
        Lower and upper ends, float32 of shape `blocks.counts`.

    Raises:
        CompressionError: The spec asks for statistics that a weight does not have.
    """
    groups = blocks.split(weight.detach())
    searched = "mse" in (spec.range_calculator_cls, spec.calculator)
    if searched or importance is not None:
        counts = None if importance is None else blocks.split(importance)
        low, high = clip_by_value(groups, spec, counts)
    else:
        low, high = torch.aminmax(groups, dim=1)
    low, high = low.to(torch.float32), high.to(torch.float32)
    fixed_low, fixed_high = spec.float_range
    if fixed_low is not None:
        low = torch.full_like(low, fixed_low)
    if fixed_high is not None:
        high = torch.full_like(high, fixed_high)
    return low.reshape(blocks.counts), high.reshape(blocks.counts)


def quantize_weight(
    weight: Tensor,
    spec: QuantizationSpec,
    blocks: Blocks,
    *,
    fixed: tuple[Tensor, Tensor | None] | None = None,
) -> QuantizedWeight:
    """Quantize a weight to the nearest representable values.

    Args:
        weight: Any float tensor.
        spec: Element type, scheme and range.
        blocks: From `plan_blocks`.
        fixed: Scale and offset of shape `blocks.counts` that training has found; from the weight's
            own range when None.

    Raises:
        CompressionError: The weight contains NaN or Inf.
    """
    if not bool(torch.isfinite(weight).all()):
        raise CompressionError("contains NaN or Inf")
    if fixed is None:
        low, high = weight_range(weight, spec, blocks)
        scale, offset = qparams(low, high, spec, scale_precision(weight, spec))
    else:
        scale, offset = fixed
    exact = weight.detach().to(torch.float32)
    wide_offset = None if offset is None else blocks.spread(offset)
    whole = has_whole_offsets(spec)
    stored = quantize(exact, blocks.spread(scale), wide_offset, grid_of(spec), whole=whole)
    return store_weight(weight, stored, scale, offset, spec, blocks)


def store_weight(
    weight: Tensor,
    stored: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    spec: QuantizationSpec,
    blocks: Blocks,
) -> QuantizedWeight:
    """The stored form of given elements.

    Args:
        weight: The weight that they stand for.
        stored: Values of the element type, float32 of the weight's shape.
        scale: Shape `blocks.counts`, float32.
        offset: Of the same shape, or None.
        spec: Element type.
        blocks: Which elements share a scale.
    """
    grid = grid_of(spec)
    kept = spec.scale_dtype or weight.dtype
    exact = weight.detach().to(torch.float32)
    wide_offset = None if offset is None else blocks.spread(offset)
    restored = dequantize(stored, blocks.spread(scale), wide_offset)
    sse = float((restored - exact).double().square().sum())
    energy = float(exact.double().square().sum())
    return QuantizedWeight(
        _packed(stored, grid.storage),
        scale.to(kept),
        _stored_offset(offset, spec),
        grid.storage,
        blocks,
        weight.dtype,
        sse,
        energy,
    )


def scale_precision(weight: Tensor, spec: QuantizationSpec) -> torch.dtype:
    """Type to which scales are rounded before anything is computed from them.

    e8m0 scales are powers of two by construction; float64 ones are computed as float32.
    """
    kept = spec.scale_dtype or weight.dtype
    return kept if kept in (torch.float16, torch.bfloat16) else torch.float32


def _stored_offset(offset: Tensor | None, spec: QuantizationSpec) -> Tensor | None:
    if offset is None:
        return None
    if spec.qformulation is QuantizationFormulation.MINVAL:
        return offset.to(torch.float32)
    return offset.to(torch.uint8 if grid_of(spec).q_min == 0 else torch.int8)


def _packed(stored: Tensor, storage: str) -> Tensor:
    if storage in _FP8:
        return stored.to(_FP8[storage]).contiguous().view(torch.uint8).reshape(-1)
    if storage == "fp4_e2m1":
        table = torch.tensor(_FP4, device=stored.device)
        codes = torch.bucketize(stored.abs(), table) + 8 * (stored < 0)
        return pack(codes.to(torch.uint8), 4)
    bits = int(storage.removeprefix("u").removeprefix("int"))
    codes = stored.to(torch.int16) & (2**bits - 1)
    return pack(codes.to(torch.uint8), bits)
