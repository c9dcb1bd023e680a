"""Reductions of tensors without axes, with which runtimes end the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["REDUCTIONS", "of_scalars", "sum_of_scalar", "whole_op"]

Op = Callable[..., Any]
_aten = torch.ops.aten


def of_scalars(result: Op, others: Op) -> Op:
    """A reduction of a tensor without axes, rewritten.

    Args:
        result: What it gives, from the tensor.
        others: The rule for tensors with axes, which takes the op first.
    """

    def rule(whole: Op, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return others(whole, x, *args, **kwargs) if x.ndim else result(x)

    return rule


def sum_of_scalar(whole: Op, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A sum or product, of a tensor without axes the tensor in the type of the result."""
    if x.ndim:
        return whole(x, *args, **kwargs)
    own = x.dtype if x.is_floating_point() else torch.int64
    return x.to(kwargs.get("dtype") or own, copy=True)


def whole_op(whole: Op, *args: Any, **kwargs: Any) -> Any:
    """The op as it is."""
    return whole(*args, **kwargs)


def _first(x: Tensor) -> Tensor:
    """Where the largest of one element is."""
    return torch.zeros_like(x, dtype=torch.int64)


def _element(x: Tensor) -> tuple[Tensor, Tensor]:
    """The only element, and where it is."""
    return x.clone(), _first(x)


def _not_zero(x: Tensor) -> Tensor:
    return torch.ne(x, 0)


# op → what it gives of a tensor without axes
REDUCTIONS: dict[Any, Op] = {
    **dict.fromkeys(
        (_aten.amax.default, _aten.amin.default, _aten.max.default, _aten.min.default), torch.clone
    ),
    **dict.fromkeys((_aten.max.dim, _aten.min.dim, _aten.topk.default), _element),
    **dict.fromkeys((_aten.argmax.default, _aten.argmin.default), _first),
    **dict.fromkeys((_aten.mean.default, _aten.mean.dim), torch.clone),
    _aten._softmax.default: torch.ones_like,
    _aten._log_softmax.default: torch.zeros_like,
    **dict.fromkeys((_aten.any.default, _aten.any.dim, _aten.any.dims), _not_zero),
    **dict.fromkeys(
        (_aten.flip.default, _aten.permute.default, _aten.index_select.default), torch.clone
    ),
}
