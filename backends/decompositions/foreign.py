"""Ops outside of aten's stable set that no target knows: experts, and losses in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.backends.decompositions.products import grouped_mm

__all__ = ["foreign_ops"]


def foreign_ops() -> dict[Any, Callable[..., Any]]:
    """Op → rule, for those that the libraries in this process have registered."""
    found: dict[Any, Callable[..., Any]] = {}
    for (library, name), rule in _RULES.items():
        packet = getattr(getattr(torch.ops, library), name, None)
        if packet is not None:
            found[packet.default] = rule
    return found


def _loss_in_pieces(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    *options: Any,
) -> tuple[Tensor, ...]:
    """The loss of a linear layer's logits; its gradients, which only training reads, are zeros."""
    ignored, smoothing, _, _, dtype, _, *differentiated = options
    logits = _logits(x, linear_weight, linear_bias, dtype)
    loss = F.cross_entropy(
        logits,
        target,
        None if weight is None else weight.to(dtype),
        ignore_index=ignored,
        reduction=reduction,
        label_smoothing=smoothing,
    )
    of_input, of_weight, of_bias = differentiated
    rows = list(linear_weight.shape)
    shapes = (
        list(x.shape) if of_input else [0, 0],
        rows if of_weight else [0, 0],
        rows[:-1] if of_bias else [0],
    )
    return loss.to(x.dtype), *(torch.zeros(shape, dtype=x.dtype) for shape in shapes)


def _losses_in_pieces(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignored: int,
    *options: Any,
) -> Tensor:
    """The loss of each row of a linear layer's logits."""
    dtype = options[-1]
    logits = _logits(x, linear_weight, linear_bias, dtype)
    losses = F.cross_entropy(
        logits,
        target,
        None if weight is None else weight.to(dtype),
        ignore_index=ignored,
        reduction="none",
    )
    return losses.to(x.dtype)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


_RULES: dict[tuple[str, str], Callable[..., Any]] = {
    ("aten", "_grouped_mm"): grouped_mm,
    ("transformers", "grouped_mm_fallback"): grouped_mm,
    ("torch_nn", "_linear_cross_entropy_batch_chunked"): _loss_in_pieces,
    ("torch_nn", "_linear_cross_entropy_batch_chunked_no_reduction"): _losses_in_pieces,
}
