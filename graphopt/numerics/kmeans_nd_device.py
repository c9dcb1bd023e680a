"""Vectors and their nearest entries: what each step of `kmeans_nd` asks for, and how a torch device answers.

Of all vectors at once it finds the entry of least `|c|² / 2 − x·c`, one product and one minimum, and the sums
of each entry's vectors; only these sums leave the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from graphopt.numerics.device import for_doubles

__all__ = ["CHUNK", "Assigned", "DevicePoints", "Points"]

CHUNK = 65_536  # vectors that are worked on together; fixes the order of summation
_Array = NDArray[np.float32]


@dataclass(frozen=True)
class Assigned(ABC):
    """Vectors by their nearest entries.

    Attributes:
        moments: Weighted sum, weight and weighted squared error of each entry's vectors, [k, d + 2].
    """

    moments: NDArray[np.float64]

    @abstractmethod
    def codes(self) -> Tensor:
        """Number of each vector's entry, on the CPU, [n]."""

    @abstractmethod
    def worst(self, count: int) -> NDArray[np.int64]:
        """Numbers of the vectors of largest weighted error, the largest first."""


class Points(ABC):
    """Vectors that are assigned to one table after the other.

    Attributes:
        x: [d, n].
        w: Their weights, [n].
    """

    def __init__(self, x: _Array, w: _Array) -> None:
        self.x, self.w = x, w

    @abstractmethod
    def nearest(self, table: _Array) -> Assigned:
        """Assign all to the entries of a table, [k, d]."""


class DevicePoints(Points):
    """Vectors on a torch device."""

    def __init__(self, device: torch.device, x: _Array, w: _Array) -> None:
        super().__init__(x, w)
        vectors = torch.from_numpy(np.ascontiguousarray(x.T)).to(device)
        self._parts = list(zip(vectors.split(CHUNK), self._weights(device), strict=True))
        self._sums = torch.float64 if for_doubles(device) == device else torch.float32

    def _weights(self, device: torch.device) -> tuple[Tensor, ...]:
        return torch.from_numpy(self.w).to(device).split(CHUNK)

    @override
    def nearest(self, table: _Array) -> Assigned:
        entries = torch.from_numpy(table).to(self._parts[0][0].device)
        level = 0.5 * entries.square().sum(1)
        codes, errors, moments = [], [], []
        for vectors, weights in self._parts:
            # the largest x·c − |c|² / 2
            code = torch.addmm(level, vectors, entries.T, beta=-1).argmax(1)
            distance = (vectors - entries[code]).square().sum(1)
            each = torch.cat([vectors, torch.ones_like(distance)[:, None], distance[:, None]], 1)
            each = each.to(self._sums) * weights[:, None]
            total = torch.zeros(len(table), each.shape[1], dtype=self._sums, device=each.device)
            moments.append(total.index_add_(0, code, each))
            codes.append(code)
            errors.append(distance * weights)
        summed = torch.stack(moments).cpu().double().sum(0).numpy()
        return _DeviceAssigned(summed, tuple(codes), tuple(errors))


@dataclass(frozen=True)
class _DeviceAssigned(Assigned):
    parts: tuple[Tensor, ...]
    errors: tuple[Tensor, ...]

    @override
    def codes(self) -> Tensor:
        return torch.cat(self.parts).cpu()

    @override
    def worst(self, count: int) -> NDArray[np.int64]:
        errors = torch.cat(self.errors)
        return errors.topk(min(count, len(errors))).indices.cpu().numpy()
