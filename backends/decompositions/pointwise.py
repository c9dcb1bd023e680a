"""Elementwise ops in arithmetic, comparisons and selection."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "acosh",
    "add_scaled",
    "asinh",
    "atan2",
    "bitwise_and",
    "bitwise_not",
    "bitwise_or",
    "bitwise_xor",
    "clamp_by_tensors",
    "clamp_in_result_type",
    "clamp_ordered",
    "copysign",
    "elu_with_scales",
    "erfinv",
    "expm1",
    "extremum_without_nan",
    "fmod",
    "hardtanh_to_one",
    "hypot",
    "isinf",
    "log1p",
    "logaddexp",
    "nan_to_num",
    "number_first",
    "reciprocal_by_division",
    "round_to_decimals",
    "rsub_scaled",
    "signbit",
    "softplus_with_threshold",
    "sub_scaled",
    "tanh_gelu",
    "trunc",
    "where_with_numbers",
]

# below, the series' four terms are exact in float32
_SMALL = 1 / 64


def add_scaled(x: Any, other: Any, *, alpha: Any = 1) -> Any:
    """`x + alpha * other`; left alone where alpha is 1."""
    return NotImplemented if alpha == 1 else x + other * alpha


def sub_scaled(x: Any, other: Any, *, alpha: Any = 1) -> Any:
    """`x - alpha * other`; left alone where alpha is 1."""
    return NotImplemented if alpha == 1 else x - other * alpha


def number_first(op: Callable[..., Any], number: Any, x: Tensor) -> Any:
    """An op of a number and a tensor as one of two tensors."""
    kind = torch.result_type(x, number)
    return op(torch.full((), number, dtype=kind, device=x.device), x)


def reciprocal_by_division(x: Tensor) -> Tensor:
    """1 / x without the term that some reciprocals add to x."""
    kind = x.dtype if x.is_floating_point() else torch.float32
    return torch.div(torch.full((), 1.0, dtype=kind, device=x.device), x)


def hardtanh_to_one(x: Tensor, low: float = -1, high: float | None = None) -> Tensor:
    """Between `low` and 1, which exports leave out, being the default; with another upper end left alone."""
    return torch.clamp(x, low, 1) if high is None else NotImplemented


def rsub_scaled(x: Tensor, other: Any, alpha: Any = 1) -> Any:
    """`other - alpha * x`; left alone where alpha is 1."""
    return NotImplemented if alpha == 1 else other - x * alpha


def bitwise_and(x: Any, other: Any) -> Any:
    """Of booleans by logic; left alone for integers."""
    return torch.logical_and(x, other) if _booleans(x, other) else NotImplemented


def bitwise_or(x: Any, other: Any) -> Any:
    """Of booleans by logic; left alone for integers."""
    return torch.logical_or(x, other) if _booleans(x, other) else NotImplemented


def bitwise_xor(x: Any, other: Any) -> Any:
    """Of booleans by logic; left alone for integers."""
    return torch.logical_xor(x, other) if _booleans(x, other) else NotImplemented


def bitwise_not(x: Tensor) -> Any:
    """Of booleans by logic, of integers by -x - 1."""
    return torch.logical_not(x) if x.dtype is torch.bool else -x - 1


def _booleans(*values: Any) -> bool:
    return all(isinstance(value, Tensor) and value.dtype is torch.bool for value in values)


def like(x: Tensor, value: Any) -> Tensor:
    """A constant of the type of `x` that broadcasts to it."""
    return torch.full([1] * x.dim(), value, dtype=x.dtype)


def clamp_by_tensors(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    """First the lower bound, then the upper one, which wins where they cross."""
    for bound in (low, high):
        x = x if bound is None else x.to(torch.result_type(x, bound))
    if low is not None:
        x = torch.maximum(x, _bound(x, low))
    if high is not None:
        x = torch.minimum(x, _bound(x, high))
    return x


def _bound(x: Tensor, bound: Any) -> Tensor:
    return bound.to(x.dtype) if isinstance(bound, Tensor) else like(x, bound)


def clamp_ordered(x: Tensor, low: Any = None, high: Any = None) -> Any:
    """Left alone where floats are clamped to ordered numbers."""
    ordered = low is None or high is None or low < high
    if x.is_floating_point() and ordered and (low is not None or high is not None):
        return NotImplemented
    return clamp_by_tensors(x, low, high)


def clamp_in_result_type(x: Tensor, low: float | None = None, high: float | None = None) -> Any:
    """Integers between floats are floats; left alone where the type stays."""
    kinds = [torch.result_type(x, bound) for bound in (low, high) if bound is not None]
    changed = next((kind for kind in kinds if kind != x.dtype), None)
    return NotImplemented if changed is None else torch.clamp(x.to(changed), low, high)


def nan_to_num(
    x: Tensor, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Tensor:
    """NaN and the infinities replaced, by 0 and the largest numbers unless given."""
    if not x.is_floating_point():
        return x.clone()
    largest = torch.finfo(x.dtype).max
    above = largest if posinf is None else posinf
    below = -largest if neginf is None else neginf
    result = torch.where(x != x, like(x, 0.0 if nan is None else nan), x)
    result = torch.where(x > largest, like(x, above), result)
    return torch.where(x < -largest, like(x, below), result)


def isinf(x: Tensor) -> Tensor:
    """Beyond the largest finite number, on either side."""
    if not x.is_floating_point():
        return x != x
    return x.abs() > torch.finfo(x.dtype).max


def signbit(x: Tensor) -> Tensor:
    """Below zero, or the negative zero, whose inverse is below zero."""
    if not x.is_floating_point():
        return x < 0
    return (x < 0) | ((x == 0) & (x.reciprocal() < 0))


def copysign(x: Tensor, other: Any) -> Tensor:
    """The magnitude of `x` with the sign of `other`."""
    x = x if x.is_floating_point() else x.float()
    if not isinstance(other, Tensor):
        return -x.abs() if math.copysign(1.0, other) < 0 else x.abs()
    return torch.where(signbit(other), -x.abs(), x.abs())


def elu_with_scales(x: Tensor, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Any:
    """Left alone where both scales are 1."""
    if scale == 1 and input_scale == 1:
        return NotImplemented
    below = torch.expm1(torch.clamp_max(x, 0) * input_scale) * (alpha * scale)
    return torch.where(x > 0, x * scale, below)


def tanh_gelu(x: Tensor, *, approximate: str = "none") -> Any:
    """The form with tanh, in its arithmetic; the exact one is left alone."""
    if approximate != "tanh":
        return NotImplemented
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1.0 + torch.tanh(inner))


def softplus_with_threshold(x: Tensor, beta: Any = 1, threshold: Any = 20) -> Any:
    """Linear above the threshold; left alone where float32 cannot tell the two apart."""
    if beta == 1 and threshold >= 18:
        return NotImplemented
    scaled = x * beta
    soft = torch.nn.functional.softplus(scaled) / beta
    return soft if threshold >= 18 else torch.where(scaled > threshold, x, soft)


def log1p(x: Tensor) -> Tensor:
    """Where 1 + x would round x away, by its series."""
    x = x if x.is_floating_point() else x.float()
    series = x * (1 - x * (1 / 2 - x * (1 / 3 - x / 4)))
    return torch.where(x.abs() < _SMALL, series, torch.log(1 + x))


def expm1(x: Tensor) -> Tensor:
    """Where exp(x) would round x away, by its series."""
    x = x if x.is_floating_point() else x.float()
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x / 24)))
    return torch.where(x.abs() < _SMALL, series, torch.exp(x) - 1)


def trunc(x: Tensor) -> Tensor:
    """Toward zero."""
    return torch.where(x < 0, torch.ceil(x), torch.floor(x)) if x.is_floating_point() else x.clone()


def fmod(x: Tensor, other: Any) -> Tensor:
    """What is left of a division that is rounded toward zero."""
    quotient = torch.div(x, other)
    return x - trunc(quotient).to(torch.result_type(x, other)) * other


def asinh(x: Tensor) -> Tensor:
    """By logarithms, exact near 0."""
    size = x.abs()
    value = torch.log1p(size + size * size / (1 + torch.sqrt(size * size + 1)))
    return torch.where(x < 0, -value, value)


def acosh(x: Tensor) -> Tensor:
    """By logarithms."""
    return torch.log(x + torch.sqrt(x - 1) * torch.sqrt(x + 1))


def hypot(x: Tensor, y: Tensor) -> Tensor:
    """Scaled, so that squares do not overflow."""
    x, y = x.abs(), y.abs()
    large, small = torch.maximum(x, y), torch.minimum(x, y)
    ratio = torch.where(large > 0, small / torch.where(large > 0, large, 1.0), 0.0)
    size = large * torch.sqrt(1 + ratio * ratio)
    # a ratio of infinities is no number
    return torch.where((x == math.inf) | (y == math.inf), math.inf, size)


def logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """The larger plus log(1 + exp(the gap below it))."""
    large = torch.maximum(x, y)
    gap = torch.where(x == y, 0.0, -(x - y).abs())
    return large + torch.log1p(torch.exp(gap))


def extremum_without_nan(x: Tensor, y: Tensor, largest: bool) -> Tensor:
    """Maximum or minimum, of the other value where one is NaN."""
    pick = torch.maximum if largest else torch.minimum
    return torch.where(x != x, y, torch.where(y != y, x, pick(x, y)))


# Giles' approximation of the inverse error function for single precision
_CENTRE = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
_TAIL = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)


def erfinv(x: Tensor) -> Tensor:
    """A polynomial of -log(1 - x²)."""
    w = -torch.log((1 - x) * (1 + x))
    centre, tail = _polynomial(_CENTRE, w - 2.5), _polynomial(_TAIL, torch.sqrt(w) - 3)
    value = torch.where(w < 5, centre, tail) * x
    return torch.where(x.abs() == 1, x * math.inf, value)


def _polynomial(factors: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, factors[0])
    for factor in factors[1:]:
        value = value * x + factor
    return value


def round_to_decimals(x: Tensor, *, decimals: int = 0) -> Tensor:
    """Rounded behind the decimal point, or before it."""
    if decimals >= 0:
        return torch.round(x * 10.0**decimals) / 10.0**decimals
    return torch.round(x / 10.0**-decimals) * 10.0**-decimals


def where_with_numbers(condition: Tensor, a: Any, b: Any) -> Tensor:
    """Numbers as tensors of the result's type."""
    kind = torch.result_type(a, b)
    shape = [1] * max(condition.dim(), 1)
    a, b = (
        value.to(kind) if isinstance(value, Tensor) else torch.full(shape, value, dtype=kind)
        for value in (a, b)
    )
    result = torch.where(condition, a, b)
    return result if condition.dim() or result.dim() != 1 else result.reshape([])


def atan2(y: Tensor, x: Tensor) -> Tensor:
    """The angle of a point; on the negative axis π, which converters' own forms turn into −π."""
    kind = torch.result_type(y, x)
    kind = kind if kind.is_floating_point else torch.get_default_dtype()
    y, x = y.to(kind), x.to(kind)
    of_ratio = torch.atan(y / torch.where(x == 0, torch.ones_like(x), x))
    upright = torch.where(y > 0, math.pi / 2, torch.where(y < 0, -math.pi / 2, 0.0)).to(kind)
    turned = of_ratio + torch.where(y < 0, -math.pi, math.pi).to(kind)
    angle = torch.where(x > 0, of_ratio, torch.where(x < 0, turned, upright))
    return torch.where(torch.isnan(x) | torch.isnan(y), x + y, angle)
