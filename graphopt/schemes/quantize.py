"""Linear quantization: a weight becomes packed integers (or narrow floats) with block-wise scales."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.config.quantization import ModuleQuantizerConfig, QuantizerConfig
from graphopt.errors import CompressionError
from graphopt.numerics.affine import (
    QParams,
    grid_of,
    has_offset,
    has_whole_offsets,
    qparams,
    quantize,
)
from graphopt.numerics.blocks import Blocks, nearest_divisor
from graphopt.numerics.clipping import clip_by_value
from graphopt.numerics.finite import all_finite
from graphopt.schemes.base import Scheme, Statistics
from graphopt.schemes.integers import QuantizedWeight, scale_precision, store_weight
from graphopt.schemes.relaxed import RelaxedInteger
from graphopt.schemes.sizes import Parts
from graphopt.specs import (
    PerBlockGranularity,
    PerChannelGranularity,
    PerGroupedChannelGranularity,
    PerTensorGranularity,
    QuantizationGranularity,
    QuantizationScheme,
    QuantizationSpec,
)
from graphopt.specs.dtypes import dtype_name, parse_dtype
from graphopt.specs.storage import Codes, StorageRules

__all__ = [
    "Quantization",
    "QuantizedWeight",
    "plan_blocks",
    "quantize_weight",
    "scale_precision",
    "store_weight",
    "weight_range",
]


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
            if granularity.block_size != -1:
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
    elif isinstance(spec.range_calculator_cls, type):
        low, high = spec.range_calculator_cls()(groups)
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
    fixed: QParams | None = None,
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
    if not all_finite(weight):
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


_TEXT = re.compile(r"(u?int\d|fp8_e4m3|fp8_e5m2|fp4_e2m1)(?: ?b(\d+))?(?: ?a(8))?")


class Quantization(Scheme[QuantizationSpec, QuantizedWeight]):
    """Weights as integers or narrow floats with scales."""

    kind: ClassVar[str] = "quantize"
    spec_type = QuantizationSpec
    stored_type = QuantizedWeight
    searched: ClassVar[bool] = True
    part: ClassVar[str] = "quantization"

    def make(self, weight: Tensor, spec: QuantizationSpec, known: Statistics) -> QuantizedWeight:
        """See `quantize_weight`; importance is not used."""
        blocks, _ = plan_blocks(weight.shape, known.output_axis, spec.granularity)
        return quantize_weight(weight, spec, blocks)

    def parts(
        self,
        spec: QuantizationSpec,
        shape: Sequence[int],
        output_axis: int,
        rules: StorageRules,
    ) -> Parts:
        """See `Scheme.parts`."""
        blocks, _ = plan_blocks(shape, output_axis, spec.granularity)
        grid, elements = grid_of(spec), math.prod(shape)
        scale = rules.scale_bits(spec.scale_dtype, grid.storage)
        if has_offset(spec):
            scale += 8 if has_whole_offsets(spec) else 32
        codes = Codes(elements, grid.bits, grid.storage)
        return Parts(elements, codes, blocks.n_blocks * scale)

    def name_of(self, spec: QuantizationSpec) -> str:
        """Such as "int8" or "int4 b32"."""
        words, per = [dtype_name(spec.dtype)], spec.granularity
        if isinstance(per, PerBlockGranularity):
            words.append(f"b{per.block_size}")
        elif isinstance(per, PerGroupedChannelGranularity):
            words.append(f"g{per.group_size}")
        elif isinstance(per, PerTensorGranularity):
            words.append("per tensor")
        words += ["asymmetric"] if spec.qscheme is QuantizationScheme.ASYMMETRIC else []
        return " ".join(words)

    def config_of(self, specs: Mapping[str, QuantizationSpec]) -> QuantizerConfig:
        """See `Scheme.config_of`."""
        return QuantizerConfig(
            global_config=ModuleQuantizerConfig(
                op_state_spec=None,
                op_input_spec=None,
                op_output_spec=None,
                module_state_spec=dict(specs),
            )
        )

    def parse(self, text: str) -> tuple[QuantizationSpec, QuantizationSpec | None] | None:
        """Read "int8" (a scale per channel), "int4 b32" (a scale per 32) or "int8 a8" (int8 inputs)."""
        match = _TEXT.fullmatch(text)
        if match is None:
            return None
        dtype, block, activation = match.groups()
        per = PerBlockGranularity(block_size=int(block)) if block else PerChannelGranularity()
        weight = QuantizationSpec(dtype=parse_dtype(dtype), granularity=per)
        return weight, QuantizationSpec() if activation else None

    def relax(
        self, stored: QuantizedWeight, spec: QuantizationSpec, target: Tensor
    ) -> RelaxedInteger | None:
        """See `Scheme.relax`; integers have neighbours."""
        return None if grid_of(spec).is_float else RelaxedInteger(stored, spec, target)
