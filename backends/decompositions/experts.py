"""Products of rows with the matrix of the group that each is in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["grouped_mm"]


def grouped_mm(
    x: Tensor, weight: Tensor, ends: Tensor | None = None, *rest: Any, **options: Any
) -> Any:
    """Every row by every group's matrix, and of these the one of its group.

    Args:
        x: Rows, sorted by group.
        weight: A matrix for each group.
        ends: Where each group ends.
        rest: A bias and a type are not taken.
        options: Likewise.
    """
    if ends is None or x.dim() != 2 or weight.dim() != 3:
        return NotImplemented
    if any(value is not None for value in (*rest, *options.values())):
        return NotImplemented
    group = (ends.reshape(1, -1) <= torch.arange(x.shape[0]).reshape(-1, 1)).to(torch.int64).sum(1)
    chosen = group.reshape(1, -1, 1) == torch.arange(weight.shape[0]).reshape(-1, 1, 1)
    every = torch.matmul(x.unsqueeze(0), weight)
    return torch.where(chosen, every, torch.zeros_like(every)).sum(0)
