"""QuantizedWeight: packed integers (or narrow floats) with block-wise scales, as they are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt.analysis.quantized import quantized_ops
from graphopt.ir.editor import Editor
from graphopt.ir.ops import STORAGE_BITS, shift_scale
from graphopt.numerics.affine import dequantize, grid_of
from graphopt.numerics.blocks import Blocks
from graphopt.numerics.packing import pack, unpack
from graphopt.numerics.sums import sum_of_squares
from graphopt.schemes.base import StoredWeight
from graphopt.schemes.sizes import Parts, tensor_bits
from graphopt.specs import QuantizationFormulation, QuantizationSpec
from graphopt.specs.storage import Codes

__all__ = ["QuantizedWeight", "scale_precision", "store_weight"]

_FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class QuantizedWeight(StoredWeight):
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

    kind: ClassVar[str] = "integers"
    nested: ClassVar[Mapping[str, type]] = {"blocks": Blocks}

    def dense(self) -> Tensor:
        """The weight as the compressed program computes it."""
        shape = list(self.blocks.shape)
        return shift_scale(self.data, self.scale, self.offset, self.storage, shape, self.dtype)

    def elements(self) -> Tensor:
        """The stored elements as numbers, of an integer type; bits of float types. int16."""
        bits = STORAGE_BITS[self.storage]
        codes = unpack(self.data, bits, math.prod(self.blocks.shape)).to(torch.int16)
        if self.storage.startswith("int"):
            codes = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
        return codes.reshape(self.blocks.shape)

    def parts(self) -> Parts:
        """Elements, with scales and offsets beside them."""
        count = math.prod(self.blocks.shape)
        codes = Codes(count, STORAGE_BITS[self.storage], self.storage)
        return Parts(count, codes, tensor_bits(self.scale, self.offset))

    def symbols(self) -> Tensor:
        """The elements less their zero points."""
        if self.offset is None:
            return self.elements()
        zero = self.blocks.spread(self.offset.float().round()).to(torch.int16)
        return self.elements() - zero

    def described(self, spec: QuantizationSpec) -> dict[str, Any]:
        """See `StoredWeight.described`."""
        blocks, scales = self.blocks, "one scale"
        if blocks.n_blocks > 1:
            pairs = zip(blocks.shape, blocks.counts, strict=True)
            sizes = "×".join(str(size // count) for size, count in pairs)
            scales = f"{blocks.n_blocks} scales over blocks of {sizes}"
        return {
            "status": "quantized",
            "detail": f"{self.storage} {spec.qscheme.value}, {scales}",
            "n_bits": STORAGE_BITS[self.storage],
        }

    def emit(
        self, edit: Editor, name: str, like: fx.Node, *, before: fx.Node | None = None
    ) -> fx.Node:
        """Emit a dequantize op: the ecosystem's for int8 with one scale, or one per channel.

        Args: as for `StoredWeight.emit`.
        """
        place: dict[str, Any] = {"like": like, "before": before}
        counts, shape = self.blocks.counts, list(self.blocks.shape)
        axes = [axis for axis, count in enumerate(counts) if count > 1]
        per_channel = len(axes) == 1 and counts[axes[0]] == shape[axes[0]]
        known = self.storage in ("int8", "uint8") and self.dtype == torch.float32
        whole = self.offset is None or not self.offset.is_floating_point()
        if known and whole and (not axes or per_channel) and self.scale.dtype == torch.float32:
            return self._emit_known(edit, name, axes, place)
        data = edit.constant(f"{name}_quantized", self.data, **place)
        scale = edit.constant(f"{name}_scale", self.scale, **place)
        offset = None
        if self.offset is not None:
            offset = edit.constant(f"{name}_offset", self.offset, **place)
        values = (data, scale, offset, self.storage, shape, self.dtype)
        return edit.call(torch.ops.graphopt.shift_scale.default, *values, **place)

    def _emit_known(
        self, edit: Editor, name: str, axes: list[int], place: dict[str, Any]
    ) -> fx.Node:
        ops = quantized_ops()
        container = torch.int8 if self.storage == "int8" else torch.uint8
        limits = (-128, 127, container) if container == torch.int8 else (0, 255, container)
        data = self.data.view(container).reshape(self.blocks.shape)
        stored = edit.constant(f"{name}_quantized", data, **place)
        if not axes:
            around = (float(self.scale), 0 if self.offset is None else int(self.offset))
            return edit.call(ops.dequantize_per_tensor.default, stored, *around, *limits, **place)
        zeros = torch.zeros(self.scale.numel(), dtype=torch.int64)
        if self.offset is not None:
            zeros = self.offset.reshape(-1).to(torch.int64)
        scales = edit.constant(f"{name}_scale", self.scale.reshape(-1), **place)
        zero_points = edit.constant(f"{name}_zero_point", zeros, **place)
        values = (stored, scales, zero_points, axes[0])
        return edit.call(ops.dequantize_per_channel.default, *values, *limits, **place)


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
    sse, energy = sum_of_squares(restored - exact), sum_of_squares(exact)
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
