"""Overloads of aten ops by their text."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["aten"]


def aten(overloads: str) -> tuple[Any, ...]:
    """Overloads such as "add.Tensor" ("linear" is "linear.default"), as far as this torch has them."""
    ops = []
    for text in overloads.split():
        packet, _, kind = text.partition(".")
        op = getattr(getattr(torch.ops.aten, packet, None), kind or "default", None)
        if op is not None:
            ops.append(op)
    return tuple(ops)
