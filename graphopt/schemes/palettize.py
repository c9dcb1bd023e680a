"""Palettization: a weight becomes packed indices and tables, by k-means on its values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphopt.errors import CompressionError
from graphopt.ir.ops import lut_to_dense, shift_scale, sparse_to_dense
from graphopt.numerics.kmeans1d import cluster_1d, look_up, sum_of_squares
from graphopt.numerics.kmeans_nd import cluster_vectors
from graphopt.numerics.packing import pack, packed_size, unpack
from graphopt.schemes.layout import Layout, plan_layout
from graphopt.schemes.tables import StoredTables, nearest_codes, quantize_tables
from graphopt.specs import PalettizationSpec

__all__ = [
    "Arranged",
    "PalettizedWeight",
    "arrange",
    "assemble",
    "palettize",
]


@dataclass(frozen=True)
class PalettizedWeight:
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

    def stored_bits(self, width: int | None = None) -> int:
        """Bits of everything that must be stored: codes, tables and scales.

        Args:
            width: Bits per code in the target, where it pads them; None is `n_bits`.
        """
        width = self.n_bits if width is None else width
        total = 8 * packed_size(math.prod(self.layout.index_shape()), width)
        total += 8 * self.lut.numel() * self.lut.element_size() * 2 ** (width - self.n_bits)
        scales = (self.lut_scale, self.lut_offset, self.channel_scale)
        for tensor in (*scales, self.outliers, self.outlier_mask):
            total += 0 if tensor is None else 8 * tensor.numel() * tensor.element_size()
        return total


def palettize(
    weight: Tensor,
    spec: PalettizationSpec,
    *,
    output_axis: int = 0,
    importance: Tensor | None = None,
    seed: int = 0,
) -> PalettizedWeight:
    """Cluster one weight.

    Args:
        weight: Floating point, any rank from 1, any device.
        spec: What it becomes.
        output_axis: Output-channel axis of the stored tensor.
        importance: Weight of each element's squared error, same shape; None weighs all alike.
        seed: Seed of the initial centroids of vector tables.

    Returns:
        Indices, tables and scales, on the device of `weight`.

    Raises:
        CompressionError: NaN or Inf in the weight, or a layout that cannot be built.
    """
    if spec.outlier_fraction:
        return _palettize_around_outliers(weight.detach(), spec, output_axis, importance, seed)
    parts = arrange(weight.detach(), spec, output_axis, importance)
    tables, codes, sse = _cluster(parts, spec, seed)
    stored = None
    if spec.lut_qspec is not None:
        stored = quantize_tables(parts.vectors, parts.weights, tables, spec.lut_qspec)
        codes = nearest_codes(parts.vectors, stored.decoded, parts.weights)
    plain = parts.channel_scale is None and parts.weights is None and stored is None
    return assemble(weight, spec, parts, stored or tables, codes, sse if plain else None)


def _palettize_around_outliers(
    weight: Tensor, spec: PalettizationSpec, output_axis: int, importance: Tensor | None, seed: int
) -> PalettizedWeight:
    """Cluster what is no outlier, and keep the outliers' differences to their table entries."""
    plain = spec.model_copy(update={"outlier_fraction": 0.0})
    count = round(spec.outlier_fraction * weight.numel())
    if count == 0:
        return palettize(weight, plain, output_axis=output_axis, importance=importance, seed=seed)
    if not bool(torch.isfinite(weight).all()):
        # they would be taken for outliers and kept
        raise CompressionError("values contain NaN or Inf")
    layout = plan_layout(weight.shape, output_axis, spec)
    grouped = layout.split(weight.float())
    distance = layout.join((grouped - grouped.mean(1, keepdim=True)).square())
    if importance is not None:
        distance = distance * importance
    places = distance.reshape(-1).topk(count).indices
    kept = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    kept[places] = False
    kept = kept.reshape(weight.shape)
    counted = kept.float() if importance is None else importance * kept
    found = palettize(
        weight.masked_fill(~kept, 0), plain, output_axis=output_axis, importance=counted, seed=seed
    )
    rest = (weight - found.dense())[~kept]
    found = replace(
        found,
        outliers=rest.contiguous(),
        outlier_mask=pack((~kept).to(torch.uint8), 1),
        energy=sum_of_squares(weight),
    )
    return replace(found, sse=float(_squared_error(weight, found)))


@dataclass(frozen=True)
class Arranged:
    """A weight laid out for its tables.

    Attributes:
        layout: Which elements share a table.
        scaled: The weight, divided by its channel scales if there are any.
        channel_scale: Per-output-channel scale, rank K, or None.
        vectors: [groups, vectors per group, cluster_dim].
        weights: Importance of each vector, [groups, vectors per group], or None.
    """

    layout: Layout
    scaled: Tensor
    channel_scale: Tensor | None
    vectors: Tensor
    weights: Tensor | None


def arrange(
    weight: Tensor, spec: PalettizationSpec, output_axis: int, importance: Tensor | None
) -> Arranged:
    """Lay a weight out for its tables; arguments as for `palettize`. Gradients pass."""
    layout = plan_layout(weight.shape, output_axis, spec)
    scaled, mass, channel_scale = weight, importance, None
    if spec.enable_per_channel_scale:
        others = [axis for axis in range(weight.ndim) if axis != output_axis]
        largest = weight.detach().abs()
        largest = largest.amax(dim=others, keepdim=True) if others else largest
        channel_scale = torch.where(largest > 0, largest, torch.ones_like(largest))
        scaled = weight / channel_scale
        # errors count in the weight's own units
        relative = channel_scale.double() / channel_scale.double().max()
        mass = relative.square().float().expand_as(weight)
        mass = mass if importance is None else mass * importance
    weights = None if mass is None else layout.split(mass).mean(-1)
    return Arranged(layout, scaled, channel_scale, layout.split(scaled), weights)


def _cluster(
    parts: Arranged, spec: PalettizationSpec, seed: int
) -> tuple[Tensor, Tensor, float | None]:
    if parts.layout.cluster_dim > 1:
        tables, codes, _ = cluster_vectors(
            parts.vectors, spec.n_entries, weights=parts.weights, seed=seed
        )
        return tables, codes, None
    values = parts.vectors[..., 0]
    found = cluster_1d(values, [spec.n_entries], weights=parts.weights)[spec.n_entries]
    return found.tables[..., None], found.indices, float(found.sse.sum())


def assemble(
    weight: Tensor,
    spec: PalettizationSpec,
    parts: Arranged,
    tables: Tensor | StoredTables,
    codes: Tensor,
    sse: float | None = None,
) -> PalettizedWeight:
    """The stored form for given tables and codes.

    Args:
        weight: What they stand for.
        spec: What was asked for.
        parts: How it was laid out.
        tables: [groups, k, cluster_dim], or quantized ones.
        codes: [groups, vectors per group].
        sse: Squared error, where it is known.
    """
    layout = parts.layout
    shape = layout.lut_shape(spec.n_entries)
    scale_shape = [*shape[:-2], 1, 1]
    stored = tables if isinstance(tables, StoredTables) else None
    lut_scale = None if stored is None else stored.scale.reshape(scale_shape)
    lut_offset = None
    if stored is not None and stored.offset is not None:
        lut_offset = stored.offset.reshape(scale_shape)
    result = PalettizedWeight(
        indices=pack(layout.join_indices(codes).contiguous(), spec.n_bits),
        lut=tables.data if isinstance(tables, StoredTables) else tables.reshape(shape).contiguous(),
        lut_scale=lut_scale,
        lut_offset=lut_offset,
        lut_storage=None if stored is None else stored.storage,
        channel_scale=parts.channel_scale,
        layout=layout,
        n_bits=spec.n_bits,
        dtype=weight.dtype,
        sse=0.0,
        energy=sum_of_squares(weight.detach()),
    )
    if sse is None:
        sse = float(_squared_error(weight.detach(), result))
    return replace(result, sse=sse)


def _squared_error(weight: Tensor, palettized: PalettizedWeight) -> Tensor:
    error = weight.float() - palettized.dense().float()
    return torch.linalg.vector_norm(error, dtype=torch.float64).square()
