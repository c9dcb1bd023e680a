"""Special functions, and the parts of floats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "angle",
    "bessel_i0",
    "digamma",
    "erfc",
    "frexp",
    "heaviside",
    "lgamma",
    "nextafter",
    "polygamma",
]

_SHIFTS = 8
_TERMS = 30
# Bernoulli numbers B₂, B₄, …
_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def erfc(x: Tensor) -> Tensor:
    """`1 − erf(x)`."""
    return 1 - torch.erf(x)


def digamma(x: Tensor) -> Tensor:
    """Recurrence to large arguments, the asymptotic series there, and reflection below 0."""
    negative = torch.lt(x, 0)
    z = torch.where(negative, 1 - x, x)
    total = torch.zeros_like(z)
    for _ in range(_SHIFTS):
        total = total - 1 / z
        z = z + 1
    square = 1 / (z * z)
    series = _polynomial(square, (-1 / 132, 1 / 240, -1 / 252, 1 / 120, -1 / 12, 0.0))
    value = total + torch.log(z) - 0.5 / z + series
    whole = torch.floor(x)
    part = x - whole
    reflected = value - math.pi / torch.tan(math.pi * part)
    pole = torch.logical_and(torch.lt(x, 0), torch.eq(part, 0))
    result = torch.where(negative, reflected, value)
    return torch.where(pole, torch.full_like(x, math.nan), result)


def polygamma(n: int, x: Tensor) -> Tensor:
    """`(−1)ⁿ⁺¹ n! ζ(n + 1, x)`, the sum of the first terms and Euler–Maclaurin's rest."""
    if n == 0:
        return digamma(x)
    power = n + 1
    total = torch.zeros_like(x)
    z = x
    for _ in range(_TERMS):
        total = total + torch.pow(z, -power)
        z = z + 1
    total = total + torch.pow(z, -n) / n + 0.5 * torch.pow(z, -power)
    rising = 1.0
    for place, number in enumerate(_BERNOULLI):
        order = 2 * place + 1
        rising = math.prod(range(power, power + order)) / math.factorial(order + 1)
        total = total + number * rising * torch.pow(z, -(power + order))
    value = (-1) ** (n + 1) * math.factorial(n) * total
    pole = torch.logical_and(torch.le(x, 0), torch.eq(x, torch.floor(x)))
    return torch.where(pole, torch.full_like(x, math.inf), value)


def bessel_i0(x: Tensor) -> Tensor:
    """Abramowitz and Stegun's 9.8.1 and 9.8.2."""
    size = torch.abs(x)
    t = size / 3.75
    near = _polynomial(
        t * t, (0.0045813, 0.0360768, 0.2659732, 1.2067492, 3.0899424, 3.5156229, 1.0)
    )
    u = 3.75 / torch.clamp(size, min=3.75)
    far = _polynomial(
        u,
        (
            0.00392377,
            -0.01647633,
            0.02635537,
            -0.02057706,
            0.00916281,
            -0.00157565,
            0.00225319,
            0.01328592,
            0.39894228,
        ),
    )
    large = torch.exp(size) / torch.sqrt(torch.clamp(size, min=3.75)) * far
    return torch.where(torch.lt(size, 3.75), near, large)


def angle(x: Tensor) -> Tensor:
    """π for what is below 0, and 0 else."""
    below = torch.where(torch.lt(x, 0), torch.full_like(x, math.pi), torch.zeros_like(x))
    return torch.where(torch.ne(x, x), x, below)


def heaviside(x: Tensor, values: Tensor) -> Tensor:
    """0, the value, or 1 for what is below, at, or above 0."""
    step = torch.where(torch.gt(x, 0), torch.ones_like(x), torch.zeros_like(x))
    step = torch.where(torch.eq(x, 0), values, step)
    return torch.where(torch.ne(x, x), torch.zeros_like(x), step)


def frexp(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mantissa in [½, 1) and exponent."""
    usual = torch.logical_and(torch.ne(x, 0), torch.lt(torch.abs(x), math.inf))
    safe = torch.where(usual, torch.abs(x), torch.ones_like(x))
    # the logarithm may be off by one at powers of two
    power = torch.floor(torch.log2(safe)) + 1
    power = torch.where(torch.ge(safe, torch.exp2(power)), power + 1, power)
    power = torch.where(torch.lt(safe, torch.exp2(power - 1)), power - 1, power)
    mantissa = torch.where(usual, x / torch.exp2(power), x)
    return mantissa, torch.where(usual, power, torch.zeros_like(x)).to(torch.int32)


def nextafter(x: Tensor, y: Tensor) -> Tensor:
    """The float beside `x` towards `y`."""
    size = torch.abs(x)
    info = torch.finfo(x.dtype)
    least = info.smallest_normal * info.eps
    power = frexp(torch.where(torch.lt(size, math.inf), size, torch.ones_like(x)))[1].to(x.dtype)
    up = torch.exp2(power - 1) * info.eps
    # below a power of two the floats are twice as dense
    down = torch.where(torch.eq(size, torch.exp2(power - 1)), up / 2, up)
    away = torch.eq(torch.gt(y, x), torch.gt(x, 0))
    step = torch.where(away, up, down)
    step = torch.where(torch.eq(x, 0), torch.full_like(x, least), step)
    moved = torch.where(torch.gt(y, x), x + step, x - step)
    moved = torch.where(torch.eq(x, y), y, moved)
    return torch.where(torch.logical_or(torch.ne(x, x), torch.ne(y, y)), x + y, moved)


# Lanczos' coefficients for g = 7
_LANCZOS = (
    676.5203681218851,
    -1259.1392167224028,
    771.32342877765313,
    -176.61502916214059,
    12.507343278686905,
    -0.13857109526572012,
    9.9843695780195716e-6,
    1.5056327351493116e-7,
)


def lgamma(x: Tensor) -> Tensor:
    """`ln |Γ(x)|` by Lanczos' series, and by reflection below ½."""
    small = torch.lt(x, 0.5)
    z = torch.where(small, 1 - x, x) - 1
    series = torch.full_like(z, 0.99999999999980993)
    for place, coefficient in enumerate(_LANCZOS):
        series = series + coefficient / (z + (place + 1))
    t = z + 7.5
    value = 0.5 * math.log(2 * math.pi) + (z + 0.5) * torch.log(t) - t + torch.log(series)
    whole = torch.floor(x)
    sine = torch.abs(torch.sin(math.pi * (x - whole)))
    reflected = math.log(math.pi) - torch.log(sine) - value
    pole = torch.logical_and(torch.le(x, 0), torch.eq(x, whole))
    result = torch.where(small, reflected, value)
    return torch.where(pole, torch.full_like(x, math.inf), result)
