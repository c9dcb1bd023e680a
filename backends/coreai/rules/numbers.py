"""Sums, products and comparisons of numbers and booleans."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "argmin",
    "bitwise_not",
    "isin",
    "isnan",
    "logical_product",
    "logical_sum",
    "of_booleans",
    "scalar_tensor",
    "scaled_add",
    "scaled_sub",
    "without_equality",
]

Number = bool | int | float


def scalar_tensor(value: Number, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    """A float that float16 does not hold, as a tensor of one axis; coreai-torch would round it."""
    if not isinstance(value, float) or math.isnan(value) or _is_half(value):
        return NotImplemented
    return torch.full((1,), value, dtype=dtype or torch.get_default_dtype()).reshape(())


def _is_half(value: float) -> bool:
    with np.errstate(over="ignore"):
        return float(np.float16(value)) == value


def scaled_add(x: Tensor, y: Tensor | Number, *, alpha: Number = 1) -> Tensor:
    """`x + alpha · y`; plain sums stay."""
    if alpha != 1:
        return torch.add(x, y * alpha)
    return _with_axis(torch.add, x, y)


def scaled_sub(x: Tensor, y: Tensor | Number, *, alpha: Number = 1) -> Tensor:
    """`x − alpha · y`; plain differences stay."""
    if alpha != 1:
        return torch.sub(x, y * alpha)
    return _with_axis(torch.sub, x, y)


def _with_axis(op: Callable[[Tensor, Any], Tensor], x: Tensor, y: Any) -> Tensor:
    """A tensor without axes and an open size, which is a tensor of one axis there; others stay."""
    if isinstance(y, torch.SymInt) and isinstance(x, Tensor) and not x.ndim:
        return op(x.reshape(1), y).reshape(())
    return NotImplemented


def logical_sum(x: Tensor, y: Any, *, alpha: Number = 1) -> Tensor:
    """`x + alpha · y`, of two booleans as `or`; plain sums of others stay."""
    if _both_bool(x, y):
        return torch.logical_or(x, y) if alpha else x.clone()
    return scaled_add(x, y, alpha=alpha)


def logical_product(x: Tensor, y: Any) -> Tensor:
    """`x · y` of two booleans as `and`; others stay."""
    return torch.logical_and(x, y) if _both_bool(x, y) else _with_axis(torch.mul, x, y)


def _both_bool(x: Any, y: Any) -> bool:
    return all(isinstance(value, Tensor) and value.dtype is torch.bool for value in (x, y))


def without_equality(strict: Any) -> Any:
    """`≥` or `≤` of floats as `>` or `<`, or `=`, which NaN makes false; integers stay.

    Args:
        strict: `torch.gt` or `torch.lt`.
    """

    def rule(x: Tensor, y: Tensor | Number) -> Tensor:
        floats = x.is_floating_point() or (
            y.is_floating_point() if isinstance(y, Tensor) else isinstance(y, float)
        )
        if _both_bool(x, y):
            return torch.logical_not(strict(y, x))
        if not floats:
            return NotImplemented
        return torch.logical_or(strict(x, y), torch.eq(x, y))

    return rule


def isnan(x: Tensor) -> Tensor:
    """`x ≠ x`."""
    return torch.ne(x, x)


def bitwise_not(x: Tensor) -> Tensor:
    """`x xor −1` of integers, all bits of which flip."""
    if x.dtype is torch.bool:
        return NotImplemented
    ones = 255 if x.dtype is torch.uint8 else -1
    return torch.bitwise_xor(x, ones)


def of_booleans(logical: Any) -> Any:
    """A bitwise op of two booleans as the logical one; integers stay.

    Args:
        logical: `torch.logical_and` or the like.
    """

    def rule(x: Tensor, y: Tensor) -> Any:
        return logical(x, y) if _both_bool(x, y) else NotImplemented

    return rule


def argmin(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """`argmax` of what has the opposite order."""
    turned = torch.neg(x) if x.is_floating_point() else torch.bitwise_not(x.to(torch.int32))
    return torch.argmax(turned, dim, keepdim)


def isin(
    elements: Tensor, tested: Tensor, *, assume_unique: bool = False, invert: bool = False
) -> Tensor:
    """Whether each element equals one of those that are tested."""
    del assume_unique
    found = torch.any(torch.eq(torch.unsqueeze(elements, -1), tested.reshape(-1)), -1)
    return torch.logical_not(found) if invert else found
