"""Reductions of tensors without axes, with which runtimes end the process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["of_scalars", "reductions", "sums_of_scalars", "whole_op"]

Op = Callable[..., Any]


def of_scalars(result: Op, others: Op) -> Op:
    """A reduction of a tensor without axes, rewritten.

    Args:
        result: What it gives, from the tensor.
        others: The rule for tensors with axes, which takes the op first.
    """

    def rule(whole: Op, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return others(whole, x, *args, **kwargs) if x.ndim else result(x)

    return rule


def sums_of_scalars(others: Op) -> Op:
    """A sum, product or mean, of a tensor without axes the tensor in the type of the result.

    Args:
        others: The rule for tensors with axes, which takes the op first.
    """

    def rule(whole: Op, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.ndim:
            return others(whole, x, *args, **kwargs)
        own = x.dtype if x.is_floating_point() else torch.int64
        return x.to(kwargs.get("dtype") or own, copy=True)

    return rule


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


# op and overload → what it gives of a tensor without axes
_REDUCTIONS: dict[str, Op] = {
    **dict.fromkeys(("amax.default", "amin.default", "max.default", "min.default"), torch.clone),
    **dict.fromkeys(("max.dim", "min.dim", "topk.default"), _element),
    "argmax.default": _first,
    "argmin.default": _first,
    "_softmax.default": torch.ones_like,
    "_log_softmax.default": torch.zeros_like,
    **dict.fromkeys(("any.default", "any.dim", "any.dims"), _not_zero),
    **dict.fromkeys(("flip.default", "permute.default", "index_select.default"), torch.clone),
}
# of a type that may be asked for
_SUMS = ("sum.dim_IntList", "prod.default", "prod.dim_int", "mean.default", "mean.dim")


def reductions(ops: Any, forms: Mapping[str, Op] | None = None) -> dict[Any, Op]:
    """Op → rule, which takes the op first.

    Args:
        ops: The namespace of torch's ops.
        forms: By op and overload, as "amax.default", the rule for tensors with axes; the op as it is
            where there is none.
    """
    given = forms or {}
    rules = {
        name: of_scalars(result, given.get(name, whole_op)) for name, result in _REDUCTIONS.items()
    }
    rules |= {name: sums_of_scalars(given.get(name, whole_op)) for name in _SUMS}
    pairs = ((name.split("."), rule) for name, rule in rules.items())
    return {getattr(getattr(ops, op), overload): rule for (op, overload), rule in pairs}
