"""Palettization: a weight becomes packed indices and tables, by k-means on its values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphopt.errors import CompressionError
from graphopt.numerics.kmeans1d import cluster_1d, look_up, sum_of_squares
from graphopt.numerics.kmeans_nd import cluster_vectors
from graphopt.numerics.packing import pack, packed_size, unpack
from graphopt.ops import lut_to_dense, shift_scale
from graphopt.schemes.tables import StoredTables, nearest_codes, quantize_tables
from graphopt.specs import (
    PalettizationSpec,
    PerGroupedChannelGranularity,
)

__all__ = [
    "Arranged",
    "Layout",
    "PalettizedWeight",
    "arrange",
    "assemble",
    "palettize",
    "plan_layout",
    "resolve_group_size",
]


@dataclass(frozen=True)
class Layout:
    """How the elements of one weight are divided among tables.

    Attributes:
        shape: Shape of the weight.
        group_axis: Axis that is cut into groups.
        group_size: Channels per table.
        vector_axis: Axis along which table entries lie, the output-channel axis.
        cluster_dim: Length of a table entry.
        note: What was changed against the spec, or "".
    """

    shape: tuple[int, ...]
    group_axis: int
    group_size: int
    vector_axis: int
    cluster_dim: int
    note: str = ""

    @property
    def n_groups(self) -> int:
        """Number of tables."""
        return self.shape[self.group_axis] // self.group_size

    def split(self, weight: Tensor) -> Tensor:
        """Arrange a tensor of `shape` as [groups, vectors per group, cluster_dim]."""
        axis, length = self.vector_axis, self.cluster_dim
        folded = weight.reshape(
            [*self.shape[:axis], self.shape[axis] // length, length, *self.shape[axis + 1 :]]
        ).movedim(axis + 1, -1)
        return folded.movedim(self.group_axis, 0).reshape(self.n_groups, -1, length)

    def join(self, vectors: Tensor) -> Tensor:
        """Inverse of `split`."""
        shape = list(self.index_shape())
        moved = [shape.pop(self.group_axis), *shape, self.cluster_dim]
        folded = vectors.reshape(moved).movedim(0, self.group_axis)
        return folded.movedim(-1, self.vector_axis + 1).reshape(self.shape)

    def index_shape(self) -> tuple[int, ...]:
        """Shape of the indices: one per vector."""
        return tuple(
            size // self.cluster_dim if axis == self.vector_axis else size
            for axis, size in enumerate(self.shape)
        )

    def join_indices(self, grouped: Tensor) -> Tensor:
        """Inverse of `split` for one code per vector, [groups, vectors] → `index_shape`."""
        shape = list(self.index_shape())
        moved = [shape.pop(self.group_axis), *shape]
        return grouped.reshape(moved).movedim(0, self.group_axis)

    def lut_shape(self, n_entries: int) -> list[int]:
        """[n_lut_0 … n_lut_{K-1}, entries, cluster_dim]."""
        axes = range(len(self.shape))
        groups = [self.n_groups if axis == self.group_axis else 1 for axis in axes]
        return [*groups, n_entries, self.cluster_dim]


@dataclass(frozen=True)
class PalettizedWeight:
    """The stored form of one palettized weight.

    `dense = channel_scale · lut_to_dense(indices, lut_scale · (lut − lut_offset))`

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
        for tensor in (self.lut_scale, self.lut_offset, self.channel_scale):
            total += 0 if tensor is None else 8 * tensor.numel() * tensor.element_size()
        return total


def resolve_group_size(
    channels: int, group_size: int, elements_per_channel: int, spec: PalettizationSpec
) -> int:
    """The group size to use where the asked one does not divide the channel count.

    It is the divisor of `channels` with the nearest ratio to `group_size` (the smaller one at a
    tie). If its tables would take more bits than the indices they serve, one table serves the
    whole tensor.
    """
    if channels % group_size == 0:
        return group_size
    divisors = [size for size in range(1, channels + 1) if channels % size == 0]
    best = min(divisors, key=lambda size: (abs(math.log(size / group_size)), size))
    table_bits = spec.n_entries * spec.cluster_dim * 16
    index_bits = best * elements_per_channel * spec.n_bits // spec.cluster_dim
    return best if table_bits <= index_bits else channels


def plan_layout(shape: Sequence[int], output_axis: int, spec: PalettizationSpec) -> Layout:
    """Divide a weight among tables as the spec asks, with the documented fallback.

    Args:
        shape: Shape of the stored weight.
        output_axis: Its output-channel axis, used where the spec gives no axis.
        spec: What is asked for.

    Raises:
        CompressionError: The axis does not exist, or `cluster_dim` divides neither the channels nor
            the group.
    """
    dims = tuple(int(size) for size in shape)
    granularity = spec.granularity
    axis, size, note = output_axis, dims[output_axis], ""
    if isinstance(granularity, PerGroupedChannelGranularity):
        axis = output_axis if granularity.axis is None else granularity.axis
        if axis >= len(dims):
            raise CompressionError(f"granularity.axis={axis}, but the weight has shape {dims}")
        channels = dims[axis]
        per_channel = math.prod(dims) // channels
        size = resolve_group_size(channels, granularity.group_size, per_channel, spec)
        if size != granularity.group_size:
            note = (
                f"group_size {granularity.group_size} does not divide {channels} channels of axis"
                f" {axis}; {'one table per tensor' if size == channels else f'groups of {size}'}"
            )
    length = spec.cluster_dim
    unit = size if axis == output_axis else dims[output_axis]
    if unit % length:
        raise CompressionError(
            f"cluster_dim={length} does not divide the {unit} channels that share a table on axis"
            f" {output_axis}"
        )
    return Layout(dims, axis, size, output_axis, length, note)


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
    parts = arrange(weight.detach(), spec, output_axis, importance)
    tables, codes, sse = _cluster(parts, spec, seed)
    stored = None
    if spec.lut_qspec is not None:
        stored = quantize_tables(parts.vectors, parts.weights, tables, spec.lut_qspec)
        codes = nearest_codes(parts.vectors, stored.decoded, parts.weights)
    plain = parts.channel_scale is None and parts.weights is None and stored is None
    return assemble(weight, spec, parts, stored or tables, codes, sse if plain else None)


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
