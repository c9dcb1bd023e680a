"""Norms in arithmetic, where a target has none of the kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["group_norm", "instance_norm", "norm_of_batch"]


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """By the statistics of groups, where the number of samples is open; else left alone."""
    if isinstance(x.shape[0], int):
        return NotImplemented
    groups = x.unflatten(1, (num_groups, x.shape[1] // num_groups))
    axes = list(range(2, groups.dim()))
    gap = groups - groups.mean(axes, keepdim=True)
    scaled = gap * torch.rsqrt((gap * gap).mean(axes, keepdim=True) + eps)
    return _with_parameters(scaled.flatten(1, 2), weight, bias)


def instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> Any:
    """By running statistics where they are wanted; else left alone, up to two spatial axes."""
    if not use_input_stats and running_mean is not None:
        return torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    if x.dim() in (3, 4):
        return NotImplemented
    return _normalized(x, list(range(2, x.dim())), weight, bias, eps)


def norm_of_batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """By the statistics of the batch."""
    axes = [0, *range(2, x.dim())]
    mean = x.mean(axes)
    shape = [1, -1, *[1] * (x.dim() - 2)]
    variance = ((x - mean.reshape(shape)) ** 2).mean(axes)
    return _normalized(x, axes, weight, bias, eps), mean, torch.rsqrt(variance + eps)


def _normalized(
    x: Tensor, axes: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    gap = x - x.mean(axes, keepdim=True)
    result = gap * torch.rsqrt((gap * gap).mean(axes, keepdim=True) + eps)
    return _with_parameters(result, weight, bias)


def _with_parameters(result: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [1, -1, *[1] * (result.dim() - 2)]
    result = result if weight is None else result * weight.reshape(shape)
    return result if bias is None else result + bias.reshape(shape)
