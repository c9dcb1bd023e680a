"""Convolutions and pooling."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from graphopt.backends.coreml.mil.values import Array, Rule, Values, given_ints, tensor

__all__ = ["CONVOLUTIONS", "torch_order"]


def _padding(
    v: Values, size: list[int], kernel: list[int], stride: list[int], dilation: list[int]
) -> list[int]:
    """[before0, after0, before1, ...] for MIL's valid / custom / same / same_lower."""
    kind = str(v.get("pad_type", "valid"))
    if kind == "valid":
        return [0] * 2 * len(size)
    if kind == "custom":
        return given_ints(v, "pad", 0, 2 * len(size))
    out = []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=False):
        total = max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
        lo = total // 2 if kind == "same" else total - total // 2
        out += [lo, total - lo]
    return out


def torch_order(pad: list[int]) -> list[int]:
    """MIL order (first spatial axis first) -> F.pad order (last axis first)."""
    return [p for i in reversed(range(len(pad) // 2)) for p in pad[2 * i : 2 * i + 2]]


def conv(v: Values) -> Array:
    x, w = tensor(v["x"]), tensor(v["weight"])
    n = x.dim() - 2
    stride, dil = given_ints(v, "strides", 1, n), given_ints(v, "dilations", 1, n)
    pad = _padding(v, list(x.shape[2:]), list(w.shape[2:]), stride, dil)
    bias = tensor(v["bias"]) if v.get("bias") is not None else None
    fn = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    return fn(F.pad(x, torch_order(pad)), w, bias, stride, 0, dil, int(v.get("groups", 1))).numpy()


def conv_transpose(v: Values) -> Array:
    x, w = tensor(v["x"]), tensor(v["weight"])
    n = x.dim() - 2
    stride, dil, groups = (
        given_ints(v, "strides", 1, n),
        given_ints(v, "dilations", 1, n),
        int(v.get("groups", 1)),
    )
    fn = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    full = fn(x, w, None, stride, 0, 0, groups, dil)
    if str(v.get("pad_type", "valid")) == "same":
        want = [a * s for a, s in zip(x.shape[2:], stride, strict=False)]
        lows = [max(0, f - o) // 2 for f, o in zip(full.shape[2:], want, strict=False)]
    else:
        pad = _padding(v, [0] * n, [0] * n, stride, dil)
        lows = pad[::2]
        want = [f - a - b for f, a, b in zip(full.shape[2:], pad[::2], pad[1::2], strict=False)]
    if v.get("output_shape") is not None:
        want = given_ints(v, "output_shape", 0, n)[-n:]
    crop = [
        c for lo, o, f in zip(lows, want, full.shape[2:], strict=False) for c in (-lo, lo + o - f)
    ]
    full = F.pad(full, torch_order(crop))
    if v.get("bias") is not None:
        full = full + tensor(v["bias"]).reshape(-1, *[1] * n)
    return full.numpy()


def _pool_padding(v: Values, size: list[int], kernel: list[int], stride: list[int]) -> list[int]:
    pad = _padding(v, size, kernel, stride, [1] * len(size))
    if not v.get("ceil_mode"):
        return pad
    for i, length in enumerate(size):
        before = pad[2 * i]
        span = length + before + pad[2 * i + 1]
        out = -(-(span - kernel[i]) // stride[i]) + 1
        if (out - 1) * stride[i] >= length + before and span > length:
            out -= 1
        pad[2 * i + 1] += max(0, (out - 1) * stride[i] + kernel[i] - span)
    return pad


def _pool(v: Values, average: bool, power: int = 1) -> torch.Tensor:
    x = tensor(v["x"])
    n = x.dim() - 2
    kernel, stride = given_ints(v, "kernel_sizes", 1, n), given_ints(v, "strides", 1, n)
    pad = torch_order(_pool_padding(v, list(x.shape[2:]), kernel, stride))
    if not average:
        padded = F.pad(x, pad, value=-float("inf"))
        return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[n - 1](padded, kernel, stride)
    avg = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[n - 1]
    mean = avg(F.pad(x**power, pad), kernel, stride)
    if v.get("exclude_padding_from_average"):
        mean = mean / avg(F.pad(torch.ones_like(x), pad), kernel, stride)
    return mean * math.prod(kernel) if power == 2 else mean


CONVOLUTIONS: dict[str, Rule] = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "max_pool": lambda v: _pool(v, False).numpy(),
    "avg_pool": lambda v: _pool(v, True).numpy(),
    "l2_pool": lambda v: _pool(v, True, 2).sqrt().numpy(),
}
