"""A loss without labels: what the model itself says is taken for the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import InputError

__all__ = ["LossFn", "label_free_loss"]

LossFn = Callable[[Any, Any], Tensor]


def label_free_loss(output: Any, generator: torch.Generator, kind: str = "mse") -> Tensor:
    """A random projection of the outputs whose squared gradients estimate the Fisher diagonal.

    Against the uncompressed program itself the gradient of a distance is zero; its curvature is
    not, and `E[(∂⟨u, y⟩/∂w)²]` over random u is that curvature: for u ~ N(0, I) the Gauss-Newton
    diagonal of the squared error (Martens, arXiv 1412.1193, section 9), for u = onehot(ŷ) − p with
    ŷ drawn from p = softmax(y) the Fisher diagonal of the KL divergence.

    Args:
        output: Outputs of a batch: a tensor, or any nesting with floating-point tensors.
        generator: Source of the draws, on the CPU.
        kind: "mse", or "kl" for logits along the last dimension.

    Returns:
        A scalar, summed over the batch.

    Raises:
        InputError: No output is a floating-point tensor, or `kind` is unknown.
    """
    if kind not in ("mse", "kl"):
        raise InputError(f"the label-free loss is 'mse' or 'kl', got {kind!r}")
    outputs = [
        leaf
        for leaf in pytree.tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    if not outputs:
        raise InputError("the model returns no floating-point tensor; give a loss_fn")
    total = outputs[0].new_zeros(())
    for tensor in outputs:
        total = total + (tensor * _direction(tensor.detach(), generator, kind)).sum()
    return total


def _direction(y: Tensor, generator: torch.Generator, kind: str) -> Tensor:
    if kind == "mse":
        drawn = torch.randn(y.shape, generator=generator, dtype=torch.float32)
        return drawn.to(y.device, y.dtype)
    p = y.float().softmax(-1)
    flat = p.reshape(-1, p.shape[-1]).cpu()
    index = torch.multinomial(flat, 1, generator=generator).to(p.device)
    hot = torch.zeros_like(p).reshape(-1, p.shape[-1]).scatter_(1, index, 1.0).reshape(p.shape)
    return (hot - p).to(y.dtype)
