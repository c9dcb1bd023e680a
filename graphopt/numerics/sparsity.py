"""Which elements of a tensor stay when a share of them becomes zero, by magnitude."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["block_mask", "channel_mask", "n_m_mask", "unstructured_mask"]


def unstructured_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Keep the `numel − ⌊numel · sparsity⌋` elements of largest magnitude.

    Args:
        weight: Any shape, floating point.
        sparsity: Share of zeros in [0, 1].

    Returns:
        bool of the weight's shape, true where an element stays. Of equal magnitudes the earlier stay.
    """
    drop = _count(weight.numel(), sparsity)
    return _without_smallest(weight.detach().abs().reshape(-1), drop).reshape(weight.shape)


def channel_mask(weight: Tensor, sparsity: float, axis: int) -> Tensor:
    """Drop the `⌊channels · sparsity⌋` channels of `axis` with the smallest sums of magnitudes."""
    axis = axis % weight.ndim
    norms = weight.detach().abs().to(torch.float32).transpose(0, axis).flatten(1).sum(1)
    keep = _without_smallest(norms, _count(norms.numel(), sparsity))
    shape = [-1 if place == axis else 1 for place in range(weight.ndim)]
    return keep.reshape(shape).expand(weight.shape).contiguous()


def block_mask(weight: Tensor, sparsity: float, axis: int, block_size: int) -> Tensor:
    """Drop the blocks of `block_size` neighbours along `axis` with the smallest Euclidean norms.

    The extent of the axis must be a multiple of the block size.
    """
    axis = axis % weight.ndim
    moved = weight.detach().to(torch.float32).movedim(axis, -1)
    norms = moved.reshape(-1, block_size).square().sum(1)
    keep = _without_smallest(norms, _count(norms.numel(), sparsity))
    whole = keep[:, None].expand(-1, block_size).reshape(moved.shape)
    return whole.movedim(-1, axis).contiguous()


def n_m_mask(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """Drop the `n` smallest of every `m` neighbours along `axis`; its extent is a multiple of `m`."""
    axis = axis % weight.ndim
    moved = weight.detach().abs().movedim(axis, -1)
    order = moved.reshape(-1, m).argsort(dim=1, stable=True)
    keep = torch.ones(order.shape, dtype=torch.bool, device=weight.device)
    keep.scatter_(1, order[:, :n], False)
    return keep.reshape(moved.shape).movedim(-1, axis).contiguous()


def _count(total: int, sparsity: float) -> int:
    # 0.7 · 10 is 6.999… in floating point
    return min(total, math.floor(total * sparsity + 1e-9))


def _without_smallest(values: Tensor, drop: int) -> Tensor:
    keep = torch.ones(values.shape, dtype=torch.bool, device=values.device)
    if drop == 0:
        return keep
    limit = torch.kthvalue(values, drop).values
    keep &= values > limit
    # of those at the limit, the first stay until enough do
    spare = int(values.numel() - drop - keep.sum())
    if spare > 0:
        keep[(values == limit).nonzero().reshape(-1)[:spare]] = True
    return keep
