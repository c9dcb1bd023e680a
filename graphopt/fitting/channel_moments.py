"""Means of channels over calibration data, and biases that take up by how much they have moved."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor

__all__ = ["ChannelMoments", "moved_bias"]


class ChannelMoments:
    """Mean and variance of each channel of a value over all of its batches, float64.

    Sums are taken about the mean of the first batch, so that channels far from 0 keep their variance.

    Args:
        axis: Channel axis of the value.
    """

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._count = 0
        self._about = self._total = self._squares = torch.zeros(())

    @classmethod
    def of(cls, values: Iterable[Tensor], axis: int) -> Self:
        """The moments of a value that is known for all batches."""
        moments = cls(axis)
        for value in values:
            moments.add(value)
        return moments

    def add(self, value: Tensor) -> None:
        """Take in a batch."""
        rows = value.detach().double().movedim(self._axis, 0).flatten(1)
        if not self._count:
            self._about = rows.mean(1)
        rows = rows - self._about[:, None]
        self._count += rows.shape[1]
        self._total = self._total + rows.sum(1)
        self._squares = self._squares + rows.square().sum(1)

    @property
    def mean(self) -> Tensor:
        """[channels]."""
        return self._total / self._count + self._about

    @property
    def variance(self) -> Tensor:
        """[channels], of the population."""
        return (self._squares / self._count - (self._total / self._count).square()).clamp_min(0)


def moved_bias(bias: Tensor, change: Tensor) -> Tensor:
    """A bias that has taken up a change, in its own type; the sum is float64."""
    return (bias.detach().double() + change.double()).to(bias.dtype)
