"""Affine quantization as functions of tensors: element types, scales from ranges, rounding.

A quantized value is `scale · (q − offset)`. Where an offset is an integer it is the zero point; the
MINVAL formulation `scale · (q − q_min) + minimum` has the offset `q_min − minimum / scale`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.specs import QuantizationFormulation, QuantizationScheme, QuantizationSpec
from graphopt.specs.dtypes import bits_of, dtype_name

__all__ = [
    "SMALLEST_SCALE",
    "Grid",
    "QParams",
    "dequantize",
    "fp4_forward",
    "grid_of",
    "has_offset",
    "has_whole_offsets",
    "qparams",
    "quantize",
    "ranged_qparams",
    "scale_limits",
]

QParams = tuple[Tensor, Tensor | None]  # scale and offset, None where it is 0; of one shape

_FLOAT_STORAGE = {
    "float8_e4m3fn": ("fp8_e4m3", 448.0, 8),
    "float8_e5m2": ("fp8_e5m2", 57344.0, 15),
    "float4_e2m1fn_x2": ("fp4_e2m1", 6.0, 2),
}
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# midpoints; those that round up at a tie (to an even mantissa) are moved down by one step
_FP4_MIDDLES = (0.25, 0.75 - 2**-24, 1.25, 1.75 - 2**-23, 2.5, 3.5 - 2**-22, 5.0)
SMALLEST_SCALE = 2.0**-100  # smallest scale: its reciprocal and multiples stay finite in float32


@dataclass(frozen=True)
class Grid:
    """The values that an element type can take.

    Attributes:
        storage: Name of the type in `graphopt.ops.shift_scale`.
        bits: Width of one element.
        q_min: Smallest stored value.
        q_max: Largest stored value.
        is_float: Whether it is a float type.
        max_exponent: Exponent of the largest binade of a float type.
    """

    storage: str
    bits: int
    q_min: float
    q_max: float
    is_float: bool = False
    max_exponent: int = 0

    @property
    def middle(self) -> int:
        """Offset of a symmetric range: 0 for signed types, half the range for unsigned ones."""
        return 0 if self.is_float else int(self.q_max + self.q_min + 1) // 2


def grid_of(spec: QuantizationSpec) -> Grid:
    """The grid of a spec; SYMMETRIC_WITH_CLIPPING drops the lowest value of a signed type."""
    name, bits = dtype_name(spec.dtype), bits_of(spec.dtype)
    if name in _FLOAT_STORAGE:
        storage, largest, exponent = _FLOAT_STORAGE[name]
        return Grid(storage, bits, -largest, largest, True, exponent)
    if name.startswith("uint"):
        return Grid(name, bits, 0, 2**bits - 1)
    lowest = -(2 ** (bits - 1))
    clipped = spec.qscheme is QuantizationScheme.SYMMETRIC_WITH_CLIPPING
    return Grid(name, bits, lowest + clipped, -lowest - 1)


def scale_limits(spec: QuantizationSpec) -> str:
    """Which bound decides a scale: "both" ends of the range, or its larger magnitude."""
    return "both" if spec.qscheme is QuantizationScheme.ASYMMETRIC else "magnitude"


def has_whole_offsets(spec: QuantizationSpec) -> bool:
    """Whether offsets are zero points, not the fractions of the MINVAL formulation."""
    return spec.qformulation is QuantizationFormulation.ZP


def has_offset(spec: QuantizationSpec) -> bool:
    """Whether values of the spec are stored with offsets."""
    asymmetric = spec.qscheme is QuantizationScheme.ASYMMETRIC
    return asymmetric or not has_whole_offsets(spec) or grid_of(spec).middle != 0


def qparams(
    low: Tensor, high: Tensor, spec: QuantizationSpec, dtype: torch.dtype = torch.float32
) -> QParams:
    """Scale and offset that cover the ranges [low, high].

    - SYMMETRIC: the smallest scale that clips neither end; with the middle m of the grid `scale =
      max(−low / (m − q_min), high / (q_max − m))`. (The frequent `max|x| / 127.5` cuts half a step
      off the largest value, which cost 2 to 6 dB at the outputs of trained networks.)
    - ASYMMETRIC: the range is widened to hold 0, `scale = (high − low) / (q_max − q_min)`,
      `zero_point = round(q_min − low / scale)`.
    - Scales of type e8m0 are powers of two (OCP Microscaling Formats v1.0, §6.3).

    A range that is the one point 0 gets scale 1.

    Args:
        low: Lower ends, any shape.
        high: Upper ends, the same shape.
        spec: Element type, scheme and formulation.
        dtype: Type that scales are rounded to before anything is computed from them.

    Returns:
        Scale, float32 of the ranges' shape, and offset (None where it is 0): integers, or fractions
        for MINVAL.
    """
    scale, offset = ranged_qparams(low, high, spec, dtype)
    whole = spec.qformulation is QuantizationFormulation.ZP
    return scale, None if offset is None or (whole and not offset.any()) else offset


def ranged_qparams(
    low: Tensor, high: Tensor, spec: QuantizationSpec, dtype: torch.dtype = torch.float32
) -> QParams:
    """`qparams` without a look at the values, so that it can be traced; offsets may all be 0."""
    grid = grid_of(spec)
    low, high = low.to(torch.float32).clamp(max=0), high.to(torch.float32).clamp(min=0)
    span = grid.q_max - grid.q_min
    if spec.qscheme is QuantizationScheme.ASYMMETRIC:
        # halves first: a range of half the float range must not overflow
        scale = _rounded(high / span - low / span, dtype)
        if spec.qformulation is QuantizationFormulation.MINVAL:
            return scale, grid.q_min - low / scale
        return scale, torch.round(grid.q_min - low / scale).clamp(grid.q_min, grid.q_max)
    magnitude = torch.maximum(-low, high)
    if spec.scale_dtype is not None and dtype_name(spec.scale_dtype) == "float8_e8m0fnu":
        exponent = torch.frexp(magnitude)[1] - 1 - grid.max_exponent
        if not grid.is_float:
            exponent = torch.frexp(magnitude / grid.q_max)[1]
        scale = torch.ldexp(torch.ones_like(magnitude), exponent.clamp(-100, 127))
        scale = torch.where(magnitude == 0, torch.ones_like(scale), scale)
        return scale, _constant_offset(scale, grid.middle)
    below, above = grid.middle - grid.q_min, grid.q_max - grid.middle
    scale = _rounded(torch.maximum(-low / below, high / above), dtype)
    if spec.qformulation is QuantizationFormulation.MINVAL:
        scale = _rounded(magnitude / (span / 2), dtype)
        return scale, grid.q_min + magnitude / scale
    return scale, _constant_offset(scale, grid.middle)


def _rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    exact = scale.to(dtype).to(torch.float32) if dtype.is_floating_point else scale
    floor = (
        max(SMALLEST_SCALE, torch.finfo(dtype).tiny) if dtype.is_floating_point else SMALLEST_SCALE
    )
    return torch.where(scale == 0, torch.ones_like(scale), exact.clamp(min=floor))


def _constant_offset(scale: Tensor, offset: int) -> Tensor | None:
    return torch.full_like(scale, float(offset)) if offset else None


def quantize(
    values: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, *, whole: bool = True
) -> Tensor:
    """The stored values nearest to `values`, as float32.

    Args:
        values: Any shape.
        scale: Broadcastable against it.
        offset: Like `scale`, or None.
        grid: Element type.
        whole: Whether offsets are integers; they are then added after rounding, as torch's
            quantize ops do.
    """
    scaled = values.to(torch.float32) * (1.0 / scale)
    if grid.is_float:
        return _round_float(scaled, grid)
    if offset is None:
        rounded = torch.round(scaled)
    else:
        rounded = torch.round(scaled) + offset if whole else torch.round(scaled + offset)
    return rounded.clamp(grid.q_min, grid.q_max)


def _round_float(scaled: Tensor, grid: Grid) -> Tensor:
    clipped = scaled.clamp(grid.q_min, grid.q_max)
    if grid.storage == "fp4_e2m1":
        table = torch.tensor(_FP4, device=scaled.device)
        middles = torch.tensor(_FP4_MIDDLES, device=scaled.device)
        return table[torch.bucketize(clipped.abs(), middles)] * torch.sign(clipped)
    kind = torch.float8_e4m3fn if grid.storage == "fp8_e4m3" else torch.float8_e5m2
    return clipped.to(kind).to(torch.float32)


def fp4_forward(tensor: Tensor) -> Tensor:
    """The nearest fp4 (E2M1) values, ties to even; what is beyond ±6 becomes ±6, NaN stays.

    Args:
        tensor: Values in units of their scale, any float type.

    Returns:
        float32 of the same shape.

    Examples:
        >>> fp4_forward(torch.tensor([0.2, 0.25, 1.3, 100.0]))
        tensor([0.0000, 0.0000, 1.5000, 6.0000])
    """
    storage, largest, exponent = _FLOAT_STORAGE["float4_e2m1fn_x2"]
    return _round_float(tensor.float(), Grid(storage, 4, -largest, largest, True, exponent))


def dequantize(stored: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """`scale · (stored − offset)`."""
    return (stored if offset is None else stored - offset) * scale
