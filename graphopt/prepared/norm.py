"""Batch norms and dropout of an exported graph, with their training behaviour."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TrainableNorm"]


class TrainableNorm(nn.Module):
    """A batch norm whose state is given to every call.

    Attributes:
        momentum: Weight of a new batch in the running statistics.
        eps: Added to the variance.
    """

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps

    def forward(
        self, x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor
    ) -> Tensor:
        """Normalised `x`; in training by the batch, which enters the running statistics."""
        return F.batch_norm(x, mean, variance, gamma, beta, self.training, self.momentum, self.eps)
