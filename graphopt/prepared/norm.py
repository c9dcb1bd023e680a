"""Batch norms of an exported graph, with their training behaviour."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TrainableNorm", "batch_weight"]


def batch_weight(momentum: float | None, tracked: Tensor | None) -> float:
    """The weight of one more batch in running statistics, which is counted.

    Args:
        momentum: That of the norm, or None for the mean over all batches.
        tracked: Number of batches seen, a scalar; None counts none.
    """
    if tracked is not None:
        tracked.add_(1)
    if momentum is not None:
        return momentum
    return 0.0 if tracked is None else 1 / float(tracked)


class TrainableNorm(nn.Module):
    """A batch norm whose state is given to every call.

    Attributes:
        momentum: Weight of a new batch in the running statistics; None for their mean over all.
        eps: Added to the variance.
    """

    def __init__(self, momentum: float | None, eps: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps

    def forward(
        self,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        tracked: Tensor | None = None,
    ) -> Tensor:
        """Normalised `x`; in training by the batch, which enters the running statistics.

        Args:
            x: Input, channels on axis 1.
            gamma: Gain, [channels].
            beta: Shift, [channels].
            mean: Running mean, [channels].
            variance: Running variance, [channels].
            tracked: Number of batches seen in training, a scalar; counts on.
        """
        momentum = batch_weight(self.momentum, tracked) if self.training else 0.0
        return F.batch_norm(x, mean, variance, gamma, beta, self.training, momentum, self.eps)
