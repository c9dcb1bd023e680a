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
    loss = _loss(
        (x, linear_weight, linear_bias),
        target,
        weight,
        dtype,
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
    return loss, *(torch.zeros(shape, dtype=x.dtype) for shape in shapes)


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
    layer = (x, linear_weight, linear_bias)
    return _loss(layer, target, weight, options[-1], ignore_index=ignored, reduction="none")


def _loss(
    layer: tuple[Tensor, Tensor, Tensor | None],
    target: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    **how: Any,
) -> Tensor:
    """The loss of the logits of rows, a matrix and a bias, computed in a type."""
    x, matrix, bias = layer
    bias, weight = (None if each is None else each.to(dtype) for each in (bias, weight))
    logits = F.linear(x.to(dtype), matrix.to(dtype), bias)
    return F.cross_entropy(logits, target, weight, **how).to(x.dtype)


_RULES: dict[tuple[str, str], Callable[..., Any]] = {
    ("aten", "_grouped_mm"): grouped_mm,
    ("transformers", "grouped_mm_fallback"): grouped_mm,
    ("torch_nn", "_linear_cross_entropy_batch_chunked"): _loss_in_pieces,
    ("torch_nn", "_linear_cross_entropy_batch_chunked_no_reduction"): _losses_in_pieces,
}
