"""WeightPruner: zeros in a weight, as many as a schedule has reached."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphopt.prepared.origin import Origin
from graphopt.schemes.prune import mask_of
from graphopt.specs import PruningSpec

__all__ = ["WeightPruner"]

_BILLION = 10**9


class WeightPruner(nn.Module):
    """Stands between a weight and its op.

    Attributes:
        origin: What it serves.
        spec: What the weight becomes.
        progress: Training steps that were counted, and the share of zeros that the mask has in parts
            per billion, int64: a cast of the model leaves them as they are.
        mask: True where an element stays, bool of the weight's shape.
    """

    mask: Tensor
    progress: Tensor

    def __init__(self, weight: Tensor, spec: PruningSpec) -> None:
        super().__init__()
        self.spec = spec
        self.origin = Origin()
        self.register_buffer("progress", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("mask", torch.ones(weight.shape, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its zeros; these hand no gradient back."""
        return weight * self.mask

    def update(self, weight: Tensor, sparsity: float) -> None:
        """Choose the mask anew, from the dense weight as it is now, if the share has changed."""
        if not self.has(sparsity):
            self.mask = mask_of(weight, self.spec, sparsity).to(self.mask.device)
            self.progress[1] = round(sparsity * _BILLION)

    @property
    def steps(self) -> int:
        """Training steps that were counted."""
        return int(self.progress[0])

    @property
    def sparsity(self) -> float:
        """Share of zeros that the mask has."""
        return int(self.progress[1]) / _BILLION

    def count_step(self) -> None:
        """One more training step."""
        self.progress[0] += 1

    def has(self, sparsity: float) -> bool:
        """Whether the mask has this share of zeros."""
        return round(sparsity * _BILLION) == int(self.progress[1])

    def extra_repr(self) -> str:
        """Scheme and share of zeros for print()."""
        return f"{self.spec.pruning_scheme.type}, sparsity={self.sparsity:.3f}"
