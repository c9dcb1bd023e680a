"""Forms of single ops: their second results, booleans, infinities and views without axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.decompositions import indexing, reductions

__all__ = [
    "as_numbers",
    "batch_norm",
    "ceil",
    "divide_rounded",
    "empty_permuted",
    "expand",
    "floor",
    "group_norm",
    "hardshrink",
    "layer_norm",
    "masked_scatter",
    "squeeze",
    "trunc",
    "zero_dim_view",
]

Op = Callable[..., Any]


def floor(x: Tensor) -> Tensor:
    """Rounded, less 1 where that is more.

    coreai-torch divides by 1, which the runtime turns infinities to NaN with, and which the compiler
    drops where the value is known.
    """
    if not x.is_floating_point():
        return x.clone()
    near = torch.round(x)
    return near - torch.gt(near, x).to(x.dtype)


def ceil(x: Tensor) -> Tensor:
    """Rounded, plus 1 where that is less; see `floor`."""
    if not x.is_floating_point():
        return x.clone()
    near = torch.round(x)
    return near + torch.lt(near, x).to(x.dtype)


def trunc(x: Tensor) -> Tensor:
    """The nearer of both to 0; see `floor`."""
    return torch.where(torch.lt(x, 0), ceil(x), floor(x)) if x.is_floating_point() else x.clone()


def divide_rounded(x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    """Floats divided towards 0, whose quotient is rounded by `trunc`; others stay."""
    if rounding_mode != "trunc" or not (_is_float(x) or _is_float(y)):
        return NotImplemented
    return trunc(torch.div(x, y))


def _is_float(value: Any) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float)


def as_numbers(whole: Op, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A reduction or comparison of booleans, of which the runtime has none, as one of integers."""
    if x.dtype is not torch.bool:
        return whole(x, *args, **kwargs)
    others = [_as_number(given) for given in args]
    result = whole(x.to(torch.int32), *others, **kwargs)
    if isinstance(result, Tensor):
        return result.to(torch.bool) if result.dtype is torch.int32 else result
    return (result[0].to(torch.bool), *result[1:])


def _as_number(value: Any) -> Any:
    boolean = isinstance(value, Tensor) and value.dtype is torch.bool
    return value.to(torch.int32) if boolean else value


def squeeze(whole: Op, x: Tensor, dims: Sequence[int]) -> Any:
    """Without axes that are to stay: coreai-torch takes none for all."""
    dropped = [axis for axis in dims if x.ndim and x.shape[axis] == 1]
    return whole(x, dropped) if dropped else torch.clone(x)


def masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Any:
    """Elements in turn where a mask of another shape is true; others stay."""
    if x.shape == mask.shape and x.ndim:
        return NotImplemented
    return indexing.masked_scatter(x, mask, source)


def hardshrink(x: Tensor, lambd: float = 0.5) -> Tensor:
    """0 where the size is at most `lambd`; NaN stays."""
    small = torch.logical_and(torch.ge(x, -lambd), torch.le(x, lambd))
    return torch.where(small, torch.zeros_like(x), x)


def batch_norm(whole: Op, x: Tensor, weight: Any, bias: Any, mean: Tensor, *rest: Any) -> Any:
    """In bfloat16, whose statistics the converter expects in float32; with weights where none are."""
    var, momentum, eps = rest
    if x.dtype is torch.bfloat16:
        result = _batch_norm_in_float32(x, weight, bias, mean, var, eps)
        return result, mean.new_zeros(0), mean.new_zeros(0)
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    return whole(x, weight, bias, mean, var, momentum, eps)


def _batch_norm_in_float32(
    x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    shape = [1, -1] + [1] * (x.ndim - 2)
    gain = torch.rsqrt(var.float() + eps)
    gain = gain if weight is None else gain * weight.float()
    shift = -mean.float() * gain
    shift = shift if bias is None else shift + bias.float()
    return (x.float() * gain.reshape(shape) + shift.reshape(shape)).to(x.dtype)


def layer_norm(
    whole: Op, x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The op, and the moments, which it does not give."""
    mean, rstd = _moments(x, list(range(x.ndim - len(shape), x.ndim)), eps)
    return whole(x, shape, weight, bias, eps)[0], mean, rstd


def group_norm(
    whole: Op, x: Tensor, weight: Any, bias: Any, n: int, c: int, hw: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The op, and the moments, which it does not give."""
    parts = x.reshape(n, groups, -1)
    mean, rstd = (torch.squeeze(value, 2) for value in _moments(parts, [2], eps))
    return whole(x, weight, bias, n, c, hw, groups, eps)[0], mean, rstd


def _moments(x: Tensor, axes: list[int], eps: float) -> tuple[Tensor, Tensor]:
    value, mean = reductions.var_mean(x, axes, correction=0, keepdim=True)
    return mean, torch.rsqrt(value + eps)


def zero_dim_view(x: Tensor, size: Sequence[int]) -> Any:
    """A view from or to no axes, which the compiler refuses."""
    if x.ndim and not len(size):
        return torch.squeeze(x, list(range(x.ndim)))
    if not x.ndim and len(size):
        for _ in size:
            x = torch.unsqueeze(x, 0)
        return x
    return NotImplemented


def expand(x: Tensor, size: Sequence[int], *, implicit: bool = False) -> Any:
    """An expansion to no axes, with which the converter ends the process; others stay."""
    del implicit
    return NotImplemented if len(size) else x.clone()


def empty_permuted(size: Sequence[int], physical_layout: Sequence[int], **options: Any) -> Tensor:
    """Zeros."""
    del physical_layout
    return torch.zeros([int(length) for length in size], dtype=options.get("dtype"))
