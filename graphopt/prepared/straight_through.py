"""Rounding to a grid with straight-through gradients.

Inside the range the gradient passes unchanged, outside it is zero (arXiv 1308.3432). Learned scales
get the gradient of LSQ (arXiv 1902.08153, equations 3 and 5).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from graphopt.ir.torch_private import learnable_per_channel
from graphopt.numerics.affine import SMALLEST_SCALE, Grid, dequantize, quantize

__all__ = ["learned_round", "round_groups", "round_tensor"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, whole: bool
    ) -> Tensor:
        zero = 0.0 if offset is None else offset
        raw = values.to(torch.float32) / scale + zero
        ctx.save_for_backward((raw >= grid.q_min - 0.5) & (raw <= grid.q_max + 0.5))
        rounded = dequantize(quantize(values, scale, offset, grid, whole=whole), scale, offset)
        return rounded.to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None, None


def _builtin(values: Tensor, grid: Grid, whole: bool) -> bool:
    """Whether torch's own kernels round the same way, only faster."""
    return whole and not grid.is_float and values.dtype == torch.float32


def round_tensor(
    values: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, *, whole: bool
) -> Tensor:
    """Round with one scale for all.

    Args:
        values: Any shape.
        scale: One element.
        offset: One element or None.
        grid: Element type.
        whole: Whether the offset is an integer.
    """
    if _builtin(values, grid, whole):
        zero = torch.zeros_like(scale) if offset is None else offset
        return torch.fake_quantize_per_tensor_affine(
            values,
            scale.reshape(()),
            zero.to(torch.int32).reshape(()),
            int(grid.q_min),
            int(grid.q_max),
        )
    return _StraightThrough.apply(values, scale, offset, grid, whole)


def round_groups(
    groups: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, *, whole: bool
) -> Tensor:
    """Round [groups, elements] with one scale per group, [groups]."""
    if _builtin(groups, grid, whole):
        zero = torch.zeros_like(scale) if offset is None else offset
        return torch.fake_quantize_per_channel_affine(
            groups, scale, zero.to(torch.int32), 0, int(grid.q_min), int(grid.q_max)
        )
    wide = None if offset is None else offset.unsqueeze(1)
    return _StraightThrough.apply(groups, scale.unsqueeze(1), wide, grid, whole)


def learned_round(
    groups: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, *, whole: bool = True
) -> Tensor:
    """Round [groups, elements] with scales that training moves (integer types only).

    A scale counts by its magnitude, as it does where training ends.
    """
    scale = scale.abs().clamp_min(SMALLEST_SCALE)
    offset = torch.zeros_like(scale) if offset is None else offset.detach().to(scale.dtype)
    factor = 1.0 / math.sqrt(max(groups.shape[1] * grid.q_max, 1))
    if whole:
        # per tensor torch's kernel cuts negative zero points off, per channel it does not
        return learnable_per_channel(
            groups, scale, offset, 0, int(grid.q_min), int(grid.q_max), factor
        )
    # torch's kernels round zero points
    step = (scale.detach() + factor * (scale - scale.detach())).unsqueeze(1)
    offset = offset.unsqueeze(1)
    raw = (groups.to(torch.float32) / step + offset).clamp(grid.q_min - 0.5, grid.q_max + 0.5)
    stored = raw + (raw.round().clamp(grid.q_min, grid.q_max) - raw).detach()
    return ((stored - offset) * step).to(groups.dtype)
