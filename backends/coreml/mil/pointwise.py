"""Activations, products and reductions in float32, and what fills tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from graphopt.backends.coreml.mil.values import Array, Rule, Values, tensor

__all__ = ["POINTWISE"]


def gelu(v: Values) -> Array:
    """Exact, or by tanh or the sigmoid."""
    x, mode = tensor(v["x"]), str(v.get("mode", "EXACT"))
    if mode == "SIGMOID_APPROXIMATION":
        return (x * torch.sigmoid(1.702 * x)).numpy()
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none").numpy()


def elu(v: Values) -> Array:
    """x, or alpha (exp(x) - 1) below 0."""
    x = tensor(v["x"])
    return torch.where(x < 0, float(v.get("alpha", 1)) * torch.expm1(x.clamp(max=0)), x).numpy()


def _by_channel(value: Any, x: torch.Tensor) -> torch.Tensor:
    given = tensor(value)
    return given.reshape([1, -1, *[1] * (x.dim() - 2)]) if given.dim() else given


def softplus(v: Values) -> Array:
    """Log(1 + exp(x)), exact where exp(x) is small."""
    return F.softplus(tensor(v["x"])).numpy()


def prelu(v: Values) -> Array:
    """x, or alpha x below 0, alpha being one for each channel."""
    x = tensor(v["x"])
    return torch.where(x < 0, _by_channel(v["alpha"], x) * x, x).numpy()


def softplus_parametric(v: Values) -> Array:
    """Alpha log(1 + exp(beta x)), alpha and beta being one for each channel."""
    x = tensor(v["x"])
    return (_by_channel(v["alpha"], x) * F.softplus(_by_channel(v["beta"], x) * x)).numpy()


def dequantize(v: Values) -> Array:
    """(q - zero point) * scale."""
    q = np.asarray(v["input"])

    def along(p: Any) -> Array:
        # scalar, or a vector along `axis`
        p = np.asarray(p, np.float32)
        if not p.ndim:
            return p
        return p.reshape([-1 if i == int(v["axis"]) % q.ndim else 1 for i in range(q.ndim)])

    zero = along(v["zero_point"]) if v.get("zero_point") is not None else np.float32(0)
    return (q.astype(np.float32) - zero) * along(v["scale"])


def linear(v: Values) -> Array:
    """X w' + bias."""
    result = tensor(v["x"]) @ tensor(v["weight"]).T
    return (result if v.get("bias") is None else result + tensor(v["bias"])).numpy()


def matmul(v: Values) -> Array:
    """Product of the last two axes, either transposed."""
    x, y = tensor(v["x"]), tensor(v["y"])
    x = x.transpose(-1, -2) if v.get("transpose_x") else x
    y = y.transpose(-1, -2) if v.get("transpose_y") else y
    return (x @ y).numpy()


def einsum(v: Values) -> Array:
    """Sum of products; axes of size 1 are broadcast."""
    return torch.einsum(str(v["equation"]), *map(tensor, v["values"])).numpy()


def softmax(v: Values) -> Array:
    """Along an axis."""
    return tensor(v["x"]).softmax(int(v.get("axis", -1))).numpy()


def _sum(of: Callable[[torch.Tensor], torch.Tensor]) -> Rule:
    def rule(v: Values) -> Array:
        x = of(tensor(v["x"]))
        return _reduced(torch.sum, x, v)

    return rule


def _axes(v: Values, x: torch.Tensor) -> list[int]:
    given = v.get("axes")
    return list(range(x.dim())) if given is None else [int(a) for a in np.atleast_1d(given)]


def _reduced(by: Callable[..., torch.Tensor], x: torch.Tensor, v: Values) -> Array:
    return by(x, _axes(v, x), keepdim=bool(v.get("keep_dims", False))).numpy()


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def reduce_mean(v: Values) -> Array:
    """Of integers too, toward zero."""
    x = tensor(v["x"])
    if x.is_floating_point():
        return _reduced(torch.mean, x, v)
    return np.trunc(_reduced(torch.mean, x.double(), v)).astype(np.int32)


def range_1d(v: Values) -> Array:
    """From start to end, step by step."""
    start, end, step = (np.asarray(v[name]).item() for name in ("start", "end", "step"))
    return np.arange(start, end, step)


def cast(v: Values) -> Array:
    """Floats toward zero; true where not 0."""
    x, dtype = np.asarray(v["x"]), str(v["dtype"])
    kind = {"fp16": "float16", "fp32": "float32", "fp64": "float64"}.get(dtype, dtype)
    return x.astype(kind)


POINTWISE: dict[str, Rule] = {
    "silu": lambda v: F.silu(tensor(v["x"])).numpy(),
    # overwrites its input in coremltools
    "thresholded_relu": lambda v: np.where(v["x"] < v["alpha"], 0, v["x"]),
    "gelu": gelu,
    "elu": elu,
    "erf": lambda v: torch.erf(tensor(v["x"])).numpy(),
    "sigmoid": lambda v: torch.sigmoid(tensor(v["x"])).numpy(),
    "prelu": prelu,
    "softplus": softplus,
    "softplus_parametric": softplus_parametric,
    "dequantize": dequantize,
    "linear": linear,
    "matmul": matmul,
    "einsum": einsum,
    "softmax": softmax,
    "reduce_sum": _sum(_same),
    "reduce_sum_square": _sum(torch.square),
    "reduce_l1_norm": _sum(torch.abs),
    "reduce_mean": reduce_mean,
    "range_1d": range_1d,
    "cast": cast,
}
