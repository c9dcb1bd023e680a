"""Ops of fewer axes than a target takes, in those of as many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Unbatched",
    "by_scale_factors",
    "matmul_of_vectors",
    "same_scalar",
    "transposed_matrix",
]


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


def same_scalar(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A scalar has no axes to move; else left alone."""
    return NotImplemented if x.dim() else x.clone()


def transposed_matrix(x: Tensor) -> Any:
    """What is no matrix stays; else left alone."""
    return NotImplemented if x.dim() == 2 else x.clone()


def by_scale_factors(op: Callable[..., Any], axes: int, *, corners: bool) -> Callable[..., Any]:
    """A rule for a resize by factors, in the op by sizes."""

    def rule(x: Tensor, size: Any, *rest: Any) -> Any:
        *aligned, factors = rest if len(rest) == 1 + corners else (*rest, None)
        if size is None:
            size = [int(n * factor) for n, factor in zip(x.shape[-axes:], factors, strict=True)]
        scales = [None] * axes if factors is None else list(factors)
        return op(x, list(size), *aligned, *scales)

    return rule
