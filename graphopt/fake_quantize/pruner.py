"""WeightPruner: zeros in a weight, as many as a schedule has reached."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphopt.fake_quantize.origin import Origin
from graphopt.schemes.prune import mask_of
from graphopt.specs import PruningSpec

__all__ = ["WeightPruner"]


class WeightPruner(nn.Module):
    """Stands between a weight and its op.

    Attributes:
        origin: What it serves.
        spec: What the weight becomes.
        sparsity: Share of zeros that the mask has.
        mask: True where an element stays, bool of the weight's shape.
    """

    mask: Tensor

    def __init__(self, weight: Tensor, spec: PruningSpec) -> None:
        super().__init__()
        self.spec = spec
        self.origin = Origin()
        self.sparsity = 0.0
        self.register_buffer("mask", torch.ones(weight.shape, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its zeros; these hand no gradient back."""
        return weight * self.mask

    def update(self, weight: Tensor, sparsity: float) -> None:
        """Choose the mask anew, from the dense weight as it is now, if the share has changed."""
        if sparsity != self.sparsity:
            self.mask = mask_of(weight, self.spec, sparsity).to(self.mask.device)
            self.sparsity = sparsity

    def extra_repr(self) -> str:
        """Scheme and share of zeros for print()."""
        return f"{self.spec.pruning_scheme.type}, sparsity={self.sparsity:.3f}"
