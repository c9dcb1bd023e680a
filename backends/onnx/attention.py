"""Attention in the form of the standard's op: four axes, equal batches, a mask of every query and key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention_of_four_axes"]

_Size = int | torch.SymInt
_AXES = 4


def attention_of_four_axes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Axes before the heads as one; batches, heads and masks repeated where torch broadcasts them.

    Left alone where there is nothing of the kind.
    """
    rank, mask = query.ndim, attn_mask
    given: list[tuple[_Size, ...]] = [x.shape[:-2] for x in (query, key, value)]
    shared = enable_gqa and not _same(given[0], given[1])
    if shared:  # each has its own number of heads
        given = [(*lead[:-1], query.shape[-3]) for lead in given]
    lead = torch.broadcast_shapes(*given)
    pairs = [query.shape[-2], key.shape[-2]]
    whole = mask is None or _same(mask.shape[-2:], pairs)
    if rank == _AXES and whole and all(_same(each, lead) for each in given):
        return NotImplemented
    if mask is not None:
        mask = mask if whole else mask.expand([*mask.shape[:-2], *pairs])
        if rank > _AXES and mask.ndim >= _AXES:
            mask = mask.expand([*lead[:-1], *mask.shape[-3:]]).flatten(0, rank - _AXES)
    query, key, value = (_of_four(x, lead, shared) for x in (query, key, value))
    made = F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=shared
    )
    return made if rank == _AXES else made.reshape([*lead, *made.shape[-2:]])


def _of_four(x: Tensor, lead: Sequence[_Size], shared: bool) -> Tensor:
    """`x` with two axes before those of a matrix."""
    heads = x.shape[-3:-2] if shared else lead[-1:]
    whole = x.expand([*lead[:-1], *heads, *x.shape[-2:]])
    while whole.ndim < _AXES:
        whole = whole.unsqueeze(0)
    return whole.flatten(0, whole.ndim - _AXES)


def _same(sizes: Sequence[_Size], others: Sequence[_Size]) -> bool:
    """Whether sizes are equal for whatever open ones become."""
    return len(sizes) == len(others) and all(
        one.node.expr == other.node.expr
        if isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt)
        else type(one) is type(other) and one == other
        for one, other in zip(sizes, others, strict=True)
    )
