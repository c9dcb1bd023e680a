"""How the elements of a weight are divided among tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from graphopt.errors import CompressionError
from graphopt.specs import PalettizationSpec, PerGroupedChannelGranularity

__all__ = ["Layout", "plan_layout", "resolve_group_size"]


@dataclass(frozen=True)
class Layout:
    """How the elements of one weight are divided among tables.

    Attributes:
        shape: Shape of the weight.
        group_axis: Axis that is cut into groups.
        group_size: Channels per table.
        vector_axis: Axis along which table entries lie.
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
        CompressionError: An axis does not exist, or `cluster_dim` divides neither the channels nor
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
    along = output_axis if spec.cluster_axis is None or length == 1 else spec.cluster_axis
    if along >= len(dims):
        raise CompressionError(f"cluster_axis={along}, but the weight has shape {dims}")
    unit = size if axis == along else dims[along]
    if unit % length:
        raise CompressionError(
            f"cluster_dim={length} does not divide the {unit} channels that share a table on axis"
            f" {along}"
        )
    return Layout(dims, axis, size, along, length, note)
