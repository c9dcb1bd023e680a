"""Blocks: how the elements of a tensor are divided among scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Blocks", "nearest_divisor"]


def nearest_divisor(extent: int, size: int) -> int:
    """The divisor of `extent` with the nearest ratio to `size`, the smaller one at a tie."""
    divisors = [divisor for divisor in range(1, extent + 1) if extent % divisor == 0]
    return min(divisors, key=lambda divisor: (abs(math.log(divisor / size)), divisor))


@dataclass(frozen=True)
class Blocks:
    """A grid of equal blocks over a tensor.

    Attributes:
        shape: Shape of the tensor.
        counts: Blocks along each axis; each divides the axis. Scales have this shape.
    """

    shape: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def n_blocks(self) -> int:
        """Number of blocks, and so of scales."""
        return math.prod(self.counts)

    def _interleaved(self) -> list[int]:
        pairs = zip(self.counts, self.shape, strict=True)
        return [part for count, size in pairs for part in (count, size // count)]

    def split(self, values: Tensor) -> Tensor:
        """Arrange a tensor of `shape` as [n_blocks, elements of a block]."""
        rank = len(self.shape)
        order = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]
        return values.reshape(self._interleaved()).permute(order).reshape(self.n_blocks, -1)

    def join(self, blocks: Tensor) -> Tensor:
        """Inverse of `split`."""
        rank = len(self.shape)
        inner = [size // count for count, size in zip(self.counts, self.shape, strict=True)]
        apart = blocks.reshape([*self.counts, *inner])
        order = [
            axis for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for axis in pair
        ]
        return apart.permute(order).reshape(self.shape)

    def spread(self, per_block: Tensor) -> Tensor:
        """Values of shape `counts`, broadcastable against a tensor of `shape`."""
        out = per_block
        for axis, (count, size) in enumerate(zip(self.counts, self.shape, strict=True)):
            if count not in (1, size):
                out = out.repeat_interleave(size // count, dim=axis)
        return out

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Blocks:
        """One block."""
        return cls(tuple(shape), (1,) * len(shape))

    @classmethod
    def of(cls, shape: Sequence[int], sizes: Sequence[int]) -> Blocks:
        """Blocks of a size along each axis, -1 being the whole axis; without sizes one block."""
        given = zip(shape, sizes or [-1] * len(shape), strict=True)
        counts = (1 if size == -1 else extent // size for extent, size in given)
        return cls(tuple(shape), tuple(counts))

    @classmethod
    def along(cls, shape: Sequence[int], axis: int, size: int) -> Blocks:
        """Blocks of `size` along one axis."""
        counts = [1] * len(shape)
        counts[axis] = shape[axis] // size
        return cls(tuple(shape), tuple(counts))
