"""Norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from graphopt.backends.coreml.mil.values import Array, Rule, Values, tensor

__all__ = ["NORMS"]


def batch_norm(v: Values) -> Array:
    """Over the channel axis, with given statistics."""
    args = [
        tensor(v[k]) if v.get(k) is not None else None
        for k in ("x", "mean", "variance", "gamma", "beta")
    ]
    return F.batch_norm(*args, training=False, eps=float(v.get("epsilon", 1e-5))).numpy()


def instance_norm(v: Values) -> Array:
    """Over the axes behind the channel axis."""
    gamma, beta = (tensor(v[k]) if v.get(k) is not None else None for k in ("gamma", "beta"))
    x = tensor(v["x"])
    axes = list(range(2, x.dim()))
    mean = x.mean(axes, keepdim=True)
    variance = ((x - mean) ** 2).mean(axes, keepdim=True)
    result = (x - mean) / (variance + float(v.get("epsilon", 1e-5))).sqrt()
    shape = [1, -1, *[1] * len(axes)]
    result = result if gamma is None else result * gamma.reshape(shape)
    return (result if beta is None else result + beta.reshape(shape)).numpy()


def layer_norm(v: Values) -> Array:
    """Over the given axes; gamma and beta have the shape of those axes."""
    x = tensor(v["x"])
    axes = [int(axis) % x.dim() for axis in v["axes"]] if "axes" in v else list(range(x.dim()))
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    mean = x.mean(axes, keepdim=True)
    variance = ((x - mean) ** 2).mean(axes, keepdim=True)
    result = (x - mean) / (variance + float(v.get("epsilon", 1e-5))).sqrt()
    if v.get("gamma") is not None:
        result = result * tensor(v["gamma"]).reshape(shape)
    if v.get("beta") is not None:
        result = result + tensor(v["beta"]).reshape(shape)
    return result.numpy()


def l2_norm(v: Values) -> Array:
    """Over the last three axes."""
    x = tensor(v["x"])
    total = (x * x).sum([-3, -2, -1], keepdim=True)
    return (x / (total + float(v.get("epsilon", 1e-6))).sqrt()).numpy()


def local_response_norm(v: Values) -> Array:
    """X / (k + alpha / size * sum of squares of the neighbours)^beta."""
    alpha, beta = float(v.get("alpha", 1e-4)), float(v.get("beta", 0.75))
    return F.local_response_norm(
        tensor(v["x"]), int(v["size"]), alpha, beta, float(v.get("k", 1.0))
    ).numpy()


def attention(v: Values) -> Array:
    """softmax(query key' / sqrt(width) + mask) value."""
    query, key, value = (tensor(v[name]) for name in ("query", "key", "value"))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if v.get("attn_mask") is not None:
        mask = tensor(v["attn_mask"])
        barred = mask.dtype is torch.bool
        scores = scores.masked_fill(~mask, -float("inf")) if barred else scores + mask
    return (scores.softmax(-1) @ value).numpy()


NORMS: dict[str, Rule] = {
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "layer_norm": layer_norm,
    "l2_norm": l2_norm,
    "local_response_norm": local_response_norm,
    "scaled_dot_product_attention": attention,
}
