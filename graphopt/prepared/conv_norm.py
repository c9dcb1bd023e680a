"""ConvNorm: a convolution and its batch norm, computed as one with the norm still running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.numerics.batchnorm import NormState, broadcast, fold_norm, gains, scale_outputs
from graphopt.prepared.norm import batch_weight
from graphopt.prepared.weight import WeightQuantizer

__all__ = ["ConvNorm"]

_SMALL = 1e-12


class ConvNorm(nn.Module):
    """Rounds the weight that deployment will round: the one with the norm's gain folded in.

    In training (Krishnamoorthi, arXiv 1806.08342, §3.2.2) the gain comes from the running variance,
    the output is divided by it again, and the norm normalises by the batch. In evaluation it is the
    folded convolution, whose weight is computed once.

    Attributes:
        op: The convolution, called with (x, weight, bias, *rest).
        rest: Its further arguments.
        transposed_groups: Groups of a transposed convolution, None for a plain one.
        quantizer: What rounds the folded weight, or None.
    """

    def __init__(
        self,
        op: Callable[..., Tensor],
        rest: tuple[Any, ...],
        transposed_groups: int | None,
        momentum: float | None,
        eps: float,
        quantizer: WeightQuantizer | None,
    ) -> None:
        super().__init__()
        self.op_name = str(op)
        self.rest = rest
        self.transposed_groups = transposed_groups
        self.momentum = momentum
        self.eps = eps
        self.quantizer = quantizer
        self._cache: tuple[tuple[Any, ...], Tensor, Tensor] | None = None

    @property
    def op(self) -> Callable[..., Tensor]:
        """The convolution."""
        op: Any = torch.ops
        for part in self.op_name.split("."):
            op = getattr(op, part)
        return op

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cache": None}

    def train(self, mode: bool = True) -> ConvNorm:
        """Switch the mode; what was computed before is forgotten."""
        self._cache = None
        return super().train(mode)

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *state: Any,
    ) -> Tensor:
        """Convolution and norm of `x`.

        Args:
            x: Input.
            weight: Weight of the convolution.
            bias: Its bias.
            state: Gain, shift, mean and variance of the norm, and where it counts the batches that
                it has seen, their number.
        """
        gamma, beta, mean, variance, *counted = state
        tracked = counted[0] if counted else None
        norm: NormState = (gamma, beta, mean, variance, self.eps)
        if self.training:
            return self._train(x, weight, bias, norm, batch_weight(self.momentum, tracked))
        folded, shift = self.folded(weight, bias, norm)
        rounded = folded if self.quantizer is None else self.quantizer(folded)
        return self.op(x, rounded, shift, *self.rest)

    def _train(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: NormState, momentum: float
    ) -> Tensor:
        gamma, beta, mean, variance, _ = norm
        gain = gains(norm)
        # a channel whose gain is zero is rounded unscaled, and zero after the norm
        gain = torch.where(gain.abs() < _SMALL, torch.ones_like(gain), gain)
        scaled = scale_outputs(weight, gain, self.transposed_groups)
        rounded = scaled if self.quantizer is None else self.quantizer(scaled)
        y = self.op(x, rounded, None, *self.rest)
        y = y / broadcast(gain, y.ndim)
        if bias is not None:
            y = y + broadcast(bias, y.ndim)
        return F.batch_norm(y, mean, variance, gamma, beta, True, momentum, self.eps)

    def folded(self, weight: Tensor, bias: Tensor | None, norm: NormState) -> tuple[Tensor, Tensor]:
        """Weight and bias with the norm folded in, kept until one of the tensors changes."""
        tensors = [tensor for tensor in (weight, bias, *norm[:4]) if isinstance(tensor, Tensor)]
        if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
            return fold_norm(weight, bias, norm, self.transposed_groups)
        key = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if self._cache is None or self._cache[0] != key:
            with torch.no_grad():
                self._cache = (key, *fold_norm(weight, bias, norm, self.transposed_groups))
        return self._cache[1], self._cache[2]
