"""Ops of fewer axes than a target takes, in those of as many."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "MOST_AXES",
    "Unbatched",
    "by_scale_factors",
    "in_few_axes",
    "matmul_of_vectors",
    "permute_in_few_axes",
    "same_scalar",
    "same_without_sizes",
    "transposed_matrix",
]

MOST_AXES = 5


class Unbatched:
    """A rule that gives an op of images a batch axis where there is none."""

    def __init__(self, op: Any, axes: int) -> None:
        self.op, self.axes = op, axes

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Leave alone what has one."""
        if x.dim() != self.axes + 1:
            return NotImplemented
        return self.op(x.unsqueeze(0), *args, **kwargs).squeeze(0)


def matmul_of_vectors(x: Tensor, y: Tensor) -> Any:
    """Vectors as matrices; left alone where there are none."""
    if x.dim() == 1 and y.dim() == 1:
        return (x * y).sum()
    if x.dim() == 1:
        return torch.matmul(x.unsqueeze(0), y).squeeze(-2)
    if y.dim() == 1:
        return torch.matmul(x, y.unsqueeze(-1)).squeeze(-1)
    return NotImplemented


def permute_in_few_axes(x: Tensor, dims: Sequence[int]) -> Any:
    """Axes that stay together move as one; left alone up to five axes."""
    if not x.dim():
        return x.clone()
    if x.dim() <= MOST_AXES:
        return NotImplemented
    order = [dim % x.dim() for dim in dims]
    runs: list[list[int]] = []
    for axis in order:
        if runs and axis == runs[-1][-1] + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    if len(runs) > MOST_AXES:
        return NotImplemented
    there = sorted(runs)
    merged = x.reshape([math.prod(x.shape[axis] for axis in run) for run in there])
    moved = merged.permute([there.index(run) for run in runs])
    return moved.reshape([x.shape[axis] for axis in order])


def in_few_axes(x: Tensor) -> Tensor:
    """Its first axes as one, so that five are left."""
    return x.flatten(0, max(x.dim() - MOST_AXES, 0))


def same_scalar(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A scalar has no axes to move; else left alone."""
    return NotImplemented if x.dim() else x.clone()


def same_without_sizes(x: Tensor, sizes: Sequence[int], **_: Any) -> Any:
    """A scalar that is spread over no axes; else left alone."""
    return NotImplemented if len(sizes) else x.clone()


def transposed_matrix(x: Tensor) -> Any:
    """What is no matrix stays; else left alone."""
    return NotImplemented if x.dim() == 2 else x.clone()


def by_scale_factors(
    op: Callable[..., Any], by_sizes: Callable[..., Any], axes: int, *, corners: bool
) -> Callable[..., Any]:
    """A rule for a resize by factors: that of the op by sizes, or the op where it leaves that alone."""

    def rule(x: Tensor, size: Any, *rest: Any) -> Any:
        *aligned, factors = rest if len(rest) == 1 + corners else (*rest, None)
        if size is None:
            size = [int(n * factor) for n, factor in zip(x.shape[-axes:], factors, strict=True)]
        scales = [None] * axes if factors is None else list(factors)
        result = by_sizes(x, list(size), *aligned, *scales)
        return op(x, list(size), *aligned, *scales) if result is NotImplemented else result

    return rule
