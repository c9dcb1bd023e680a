"""Attention in the plain form: as many heads of keys and values as of queries."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention_of_equal_heads"]


def attention_of_equal_heads(
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
    """Keys and values repeated, the mask in the queries' type, rows without a key zero.

    Left alone where there is nothing of the kind.
    """
    shared = enable_gqa and key.shape[-3] != query.shape[-3]
    barred = attn_mask is not None and attn_mask.dtype is torch.bool
    foreign = attn_mask is not None and not barred and attn_mask.dtype != query.dtype
    if not shared and not foreign and not barred:
        return NotImplemented
    if shared:
        key = _repeated(key, query.shape[-3] // key.shape[-3])
        value = _repeated(value, query.shape[-3] // value.shape[-3])
    if not barred or attn_mask is None:
        mask = attn_mask.to(query.dtype) if attn_mask is not None else None
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale
        )
    open_rows = attn_mask.any(-1, keepdim=True)
    mask = torch.where(attn_mask | ~open_rows, 0.0, -math.inf).to(query.dtype)
    mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale)
    return torch.where(open_rows, mixed, torch.zeros_like(mixed))


def _repeated(x: Tensor, times: int) -> Tensor:
    """Each head as often as queries share it."""
    shape = list(x.shape)
    full = x.unsqueeze(-3).expand([*shape[:-2], times, *shape[-2:]])
    return full.reshape([*shape[:-3], shape[-3] * times, *shape[-2:]])
