"""torch's own primitives, which its decompositions leave, as ops of aten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.decompositions import comparisons, pointwise, reductions, special

__all__ = ["primitives", "with_tensors"]

_prims: Any = torch.ops.prims
_SAME_NAME = (
    *("abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "bitwise_and"),
    *("bitwise_not", "bitwise_or", "bitwise_xor", "ceil", "clone", "cos", "cosh", "div", "eq"),
    *("erf", "exp", "exp2", "expm1", "floor", "fmod", "ge", "gt", "le", "log", "log10", "log1p"),
    *("log2", "lt", "maximum", "minimum", "mul", "ne", "neg", "pow", "reciprocal", "remainder"),
    *("round", "rsqrt", "sign", "sin", "sinh", "sqrt", "sub", "add", "tan", "tanh", "trunc"),
    "where",
)


def primitives(
    form: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda op: op,
    others: Mapping[str, Callable[..., Any]] | None = None,
) -> dict[Any, Callable[..., Any]]:
    """Primitive → rule.

    Args:
        form: What becomes of torch's function of a primitive's name.
        others: Rules of a target's own, by the primitive's name.
    """
    table: dict[Any, Callable[..., Any]] = {
        getattr(_prims, name).default: form(getattr(torch, name)) for name in _SAME_NAME
    }
    table |= {
        _prims.fmax.default: lambda x, y: pointwise.extremum_without_nan(x, y, True),
        _prims.fmin.default: lambda x, y: pointwise.extremum_without_nan(x, y, False),
        _prims.signbit.default: pointwise.signbit,
        _prims.hypot.default: pointwise.hypot,
        _prims.frexp.default: special.frexp,
        _prims.nextafter.default: special.nextafter,
        _prims.lgamma.default: special.lgamma,
        _prims.digamma.default: special.digamma,
        _prims.erfc.default: special.erfc,
        _prims.erf_inv.default: pointwise.erfinv,
        _prims.bessel_i0.default: special.bessel_i0,
        _prims.prod.default: _prod,
        _prims.sum.default: lambda x, dims, **_: torch.sum(x, list(dims)),
        _prims.amax.default: lambda x, dims, **_: torch.amax(x, list(dims)),
        _prims.amin.default: lambda x, dims, **_: torch.amin(x, list(dims)),
        _prims.var.default: _var,
        _prims.convert_element_type.default: lambda x, dtype: x.to(dtype),
        _prims.broadcast_in_dim.default: _broadcast_in_dim,
        _prims.scalar_tensor.default: _scalar,
        _prims.as_strided_scatter.default: comparisons.as_strided_scatter,
    }
    return table | {getattr(_prims, name).default: rule for name, rule in (others or {}).items()}


def with_tensors(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op of tensors alone: what torch decomposes for numbers would come back as a primitive."""

    def rule(*args: Any) -> Any:
        first = next(given for given in args if isinstance(given, Tensor))
        same = [
            given
            if isinstance(given, Tensor)
            else torch.full((), given, dtype=first.dtype, device=first.device)
            for given in args
        ]
        return op(*same)

    return rule


def _prod(x: Tensor, dims: Sequence[int], **_: Any) -> Tensor:
    for axis in sorted(dims, reverse=True):
        x = torch.prod(x, axis)
    return x


def _var(x: Tensor, dims: Any, correction: float = 1, **_: Any) -> Tensor:
    return reductions.var(x, dims, correction=correction)


def _broadcast_in_dim(x: Tensor, shape: Sequence[int], dims: Sequence[int]) -> Tensor:
    sizes = [1] * len(shape)
    for axis, place in enumerate(dims):
        sizes[place] = int(x.shape[axis])
    return x.reshape(sizes).expand(list(shape))


def _scalar(value: Any, dtype: Any = None, device: Any = None) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)
