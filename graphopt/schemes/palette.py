"""PalettizedWeight: packed indices and tables, as they are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt.ir.editor import Editor
from graphopt.ir.ops import lut_to_dense, shift_scale, sparse_to_dense
from graphopt.numerics.kmeans1d import look_up
from graphopt.numerics.packing import unpack
from graphopt.schemes.base import StoredWeight
from graphopt.schemes.layout import Layout
from graphopt.schemes.sizes import Parts, tensor_bits
from graphopt.specs import PalettizationSpec
from graphopt.specs.storage import Codes

__all__ = ["PalettizedWeight"]

_ops = torch.ops.graphopt


@dataclass(frozen=True)
class PalettizedWeight(StoredWeight):
    """The stored form of one palettized weight.

    `dense = channel_scale · lut_to_dense(indices, lut_scale · (lut − lut_offset)) + outliers`

    Attributes:
        indices: Packed codes, uint8 1-D.
        lut: Tables, [n_lut_0 … n_lut_{K-1}, 2**n_bits, cluster_dim], in the weight's dtype, or
            packed bytes when `lut_storage` names a narrow type.
        lut_scale: One scale per table, rank K + 2; None for a table in the weight's dtype.
        lut_offset: Zero points of the shape of `lut_scale`, or None.
        lut_storage: Element type of quantized tables (`graphopt.ops.shift_scale`), or None.
        channel_scale: Per-output-channel scale, rank K, or None.
        layout: How elements belong to tables.
        n_bits: Bits per code.
        dtype: Type of the dense weight.
        sse: Sum of squared errors against the weight, float64.
        energy: Sum of squares of the weight.
        outliers: What a few weights have beyond their table entries, 1-D in row-major order, in
            `dtype`; None without any.
        outlier_mask: Packed bits of their places, uint8 1-D, or None.
    """

    indices: Tensor
    lut: Tensor
    lut_scale: Tensor | None
    lut_offset: Tensor | None
    lut_storage: str | None
    channel_scale: Tensor | None
    layout: Layout
    n_bits: int
    dtype: torch.dtype
    sse: float
    energy: float
    outliers: Tensor | None = None
    outlier_mask: Tensor | None = None

    kind: ClassVar[str] = "palette"
    nested: ClassVar[Mapping[str, type]] = {"layout": Layout}

    @property
    def op_vector_axis(self) -> int | None:
        """`vector_axis` as the lookup op wants it: None for scalar entries."""
        return self.layout.vector_axis if self.layout.cluster_dim > 1 else None

    def lut_shape(self) -> list[int]:
        """Logical shape of the tables."""
        return self.layout.lut_shape(2**self.n_bits)

    def table_values(self) -> Tensor:
        """Tables in the weight's type, of `lut_shape`."""
        if self.lut_storage is None or self.lut_scale is None:
            return self.lut
        return shift_scale(
            self.lut,
            self.lut_scale,
            self.lut_offset,
            self.lut_storage,
            self.lut_shape(),
            self.dtype,
        )

    def dense(self) -> Tensor:
        """The weight that this stands for, of `layout.shape` and `dtype`."""
        weight = self._from_tables()
        if self.outliers is None or self.outlier_mask is None:
            return weight
        return weight + sparse_to_dense(self.outliers, self.outlier_mask, self.layout.shape)

    def _from_tables(self) -> Tensor:
        layout = self.layout
        plain = self.lut_storage is None and self.channel_scale is None and layout.cluster_dim == 1
        plain = plain and self.lut.device.type == "cpu" and self.lut.dtype is torch.float32
        if plain and (layout.group_axis == 0 or layout.n_groups == 1):
            # groups are contiguous: no group index per element is needed
            codes = unpack(self.indices, self.n_bits, math.prod(layout.shape))
            tables = self.lut.reshape(layout.n_groups, -1)
            return look_up(codes.reshape(layout.n_groups, -1), tables).reshape(layout.shape)
        shape, lut = self.layout.shape, self.table_values()
        weight = lut_to_dense(self.indices, lut, self.n_bits, shape, self.op_vector_axis)
        if self.channel_scale is not None:
            weight = shift_scale(weight, self.channel_scale, None, "float", shape, self.dtype)
        return weight

    def parts(self) -> Parts:
        """Codes and tables, with scales and outliers beside them."""
        layout = self.layout
        slots = layout.n_groups * 2**self.n_bits
        codes = Codes(
            math.prod(layout.index_shape()),
            self.n_bits,
            tables=layout.n_groups,
            slot_bits=tensor_bits(self.lut) // slots,
        )
        sides = (self.lut_scale, self.lut_offset, self.channel_scale)
        bits = tensor_bits(*sides, self.outliers, self.outlier_mask)
        return Parts(math.prod(layout.shape), codes, bits)

    def symbols(self) -> Tensor:
        """The codes, 1-D."""
        return unpack(self.indices, self.n_bits, math.prod(self.layout.index_shape()))

    def described(self, spec: PalettizationSpec) -> dict[str, Any]:
        """See `StoredWeight.described`."""
        layout = self.layout
        tables = "one table"
        if layout.n_groups > 1:
            tables = f"{layout.n_groups} tables on axis {layout.group_axis}"
        words = [f"{self.n_bits}-bit", tables]
        if layout.cluster_dim > 1:
            along = "" if spec.cluster_axis is None else f" along axis {spec.cluster_axis}"
            words.append(f"entries of {layout.cluster_dim}{along}")
        if self.lut_storage is not None:
            words.append(f"{self.lut_storage} table")
        if self.channel_scale is not None:
            words.append("per-channel scale")
        if self.outliers is not None:
            words.append(f"{self.outliers.numel()} outliers")
        return {
            "status": "palettized",
            "detail": ", ".join(words),
            "note": layout.note,
            "n_bits": self.n_bits,
            "n_luts": layout.n_groups,
        }

    def emit(
        self, edit: Editor, name: str, like: fx.Node, *, before: fx.Node | None = None
    ) -> fx.Node:
        """Emit a lookup; a quantized table, a scale and outliers go through ops of their own.

        Args: as for `StoredWeight.emit`.
        """
        place: dict[str, Any] = {"like": like, "before": before}
        shape, axis = list(self.layout.shape), self.op_vector_axis
        indices = edit.constant(f"{name}_indices", self.indices, **place)
        lut = self._emit_tables(edit, name, place)
        entry = () if axis is None else (axis,)
        dense = edit.call(
            _ops.lut_to_dense.default, indices, lut, self.n_bits, shape, *entry, **place
        )
        if self.channel_scale is not None:
            scale = edit.constant(f"{name}_channel_scale", self.channel_scale, **place)
            scaled = (dense, scale, None, "float", shape, self.dtype)
            dense = edit.call(_ops.shift_scale.default, *scaled, **place)
        if self.outliers is None or self.outlier_mask is None:
            return dense
        values = edit.constant(f"{name}_outliers", self.outliers, **place)
        mask = edit.constant(f"{name}_outlier_mask", self.outlier_mask, **place)
        sparse = edit.call(_ops.sparse_to_dense.default, values, mask, shape, **place)
        return edit.call(torch.ops.aten.add.Tensor, dense, sparse, **place)

    def _emit_tables(self, edit: Editor, name: str, place: dict[str, Any]) -> fx.Node:
        lut = edit.constant(f"{name}_lut", self.lut, **place)
        if self.lut_scale is None:
            return lut
        scale = edit.constant(f"{name}_lut_scale", self.lut_scale, **place)
        offset = None
        if self.lut_offset is not None:
            offset = edit.constant(f"{name}_lut_offset", self.lut_offset, **place)
        values = (lut, scale, offset, self.lut_storage, self.lut_shape(), self.dtype)
        return edit.call(_ops.shift_scale.default, *values, **place)
