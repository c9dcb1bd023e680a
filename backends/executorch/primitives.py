"""torch's own primitives, which its decompositions leave, in ops that have kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.decompositions import comparisons, pointwise, special
from graphopt.backends.executorch import exact_ops

__all__ = ["PRIMITIVES"]

_prims: Any = torch.ops.prims


def _broadcast_in_dim(x: Tensor, shape: list[int], dims: list[int]) -> Tensor:
    sizes = [1] * len(shape)
    for axis, place in enumerate(dims):
        sizes[place] = x.shape[axis]
    return x.reshape(sizes).expand(list(shape))


def _product(x: Tensor, dims: list[int], **_: Any) -> Tensor:
    for axis in sorted(dims, reverse=True):
        x = torch.prod(x, axis)
    return x


_SAME_NAME = (
    *("abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "bitwise_and"),
    *("bitwise_not", "bitwise_or", "bitwise_xor", "ceil", "clone", "cos", "cosh", "div", "eq"),
    *("erf", "exp", "expm1", "floor", "fmod", "ge", "gt", "le", "log", "log10", "log1p", "log2"),
    *("lt", "maximum", "minimum", "mul", "ne", "neg", "pow", "reciprocal", "remainder", "round"),
    *("rsqrt", "sign", "sin", "sinh", "sqrt", "sub", "add", "tan", "tanh", "trunc", "where"),
)
PRIMITIVES: dict[Any, Callable[..., Any]] = {
    **{getattr(_prims, name).default: getattr(torch, name) for name in _SAME_NAME},
    _prims.exp2.default: exact_ops.exp2,
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
    _prims.prod.default: _product,
    _prims.sum.default: lambda x, dims, **_: torch.sum(x, list(dims)),
    _prims.amax.default: lambda x, dims, **_: torch.amax(x, list(dims)),
    _prims.amin.default: lambda x, dims, **_: torch.amin(x, list(dims)),
    _prims.var.default: lambda x, dims, correction=1, **_: torch.var(
        x, list(dims), correction=correction
    ),
    _prims.convert_element_type.default: lambda x, dtype: x.to(dtype),
    _prims.broadcast_in_dim.default: _broadcast_in_dim,
    _prims.scalar_tensor.default: lambda value, dtype=None, device=None: torch.full(
        (), value, dtype=dtype, device=device
    ),
    _prims.as_strided_scatter.default: comparisons.as_strided_scatter,
}
