"""Attention whose masks, ranks or sizes converters get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["attention"]

_LOW = -1e30


def attention(
    whole: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Four axes, masks of finite numbers, and values of the queries' width.

    Rows that are masked as a whole are 0. Plain calls stay.
    """
    rank = query.ndim
    wide = int(value.shape[-1]) != int(query.shape[-1])
    if rank == 4 and attn_mask is None and not wide and scale != 0 and not dropout_p:
        return whole(query, key, value, None, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    lead = list(query.shape[:-2])
    if rank == 4:
        q, k, v = query, key, value
    else:
        q, k, v = (_four(x, lead, rank) for x in (query, key, value))
    kept = None
    if attn_mask is not None:
        attn_mask, kept = _finite(_mask_of_four(attn_mask, lead, rank), q.dtype)
    options = {"scale": scale, "enable_gqa": enable_gqa}
    if wide:
        made = _wide(whole, (q, k, v), attn_mask, is_causal, options)
    else:
        made = whole(q, k, v, attn_mask, 0.0, is_causal, **options)
    if kept is not None:
        made = torch.where(kept, made, torch.zeros_like(made))
    shape = [*lead, query.shape[-2], value.shape[-1]]
    return made if rank == 4 else made.reshape(shape)


def _four(x: Tensor, lead: list[int], rank: int) -> Tensor:
    """The tensor with two leading axes."""
    if rank < 4:
        return x.reshape([1] * (4 - rank) + list(x.shape))
    whole = x.expand([*lead[:-1], *x.shape[-3:]])
    return whole.flatten(0, rank - 4)


def _mask_of_four(mask: Tensor, lead: list[int], rank: int) -> Tensor:
    if rank <= 4:
        return mask.reshape([1] * (4 - mask.ndim) + list(mask.shape))
    if mask.ndim <= 2:
        return mask.reshape([1] * (4 - mask.ndim) + list(mask.shape))
    sizes = list(mask.shape)
    heads = sizes[-3]
    return mask.expand([*lead[:-1], heads, *sizes[-2:]]).flatten(0, rank - 4)


def _finite(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mask as finite numbers, and rows in which something is not masked."""
    if mask.dtype is torch.bool:
        low = torch.full_like(mask, _LOW, dtype=dtype)
        return torch.where(mask, torch.zeros_like(low), low), torch.any(mask, -1, keepdim=True)
    kept = torch.any(torch.ne(mask, -torch.inf), -1, keepdim=True)
    return torch.clamp(mask, min=_LOW).to(dtype), kept


def _wide(
    whole: Callable[..., Any],
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    is_causal: bool,
    options: dict[str, Any],
) -> Tensor:
    """Attention whose values have another width, by padding with zeros."""
    query, key, value = tensors
    width, own = int(query.shape[-1]), int(value.shape[-1])
    scale = options["scale"] or width**-0.5
    most = max(width, own)
    q, k, v = (
        torch.constant_pad_nd(x, [0, most - int(x.shape[-1])]) if int(x.shape[-1]) < most else x
        for x in (query, key, value)
    )
    made = whole(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=options["enable_gqa"])
    return torch.narrow(made, -1, 0, own)
