"""Batch norms in evaluation mode as a scale of the convolution before them.

With γ, β, μ, σ² of the norm and s = γ / √(σ² + ε) per output channel:
`bn(conv(x; W, b)) = conv(x; s·W, s·(b − μ) + β)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NormState", "broadcast", "fold_norm", "gains", "scale_outputs"]

NormState = tuple[Tensor | None, Tensor | None, Tensor, Tensor, float]  # γ, β, μ, σ², ε


def gains(norm: NormState) -> Tensor:
    """Gain of each channel, γ / √(σ² + ε), in the norm's own precision."""
    gamma, _, _, variance, eps = norm
    scale = (variance + eps).rsqrt()
    return scale if gamma is None else scale * gamma


def scale_outputs(weight: Tensor, scale: Tensor, transposed_groups: int | None) -> Tensor:
    """A weight with each output channel multiplied by its scale.

    Args:
        weight: [out, in / groups, …], or [in, out / groups, …] of a transposed convolution.
        scale: [out].
        transposed_groups: Groups of a transposed convolution, None for a plain one.
    """
    if transposed_groups is None:
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    # the channels of a group of outputs are those of its inputs' rows
    rows = weight.shape[0] // transposed_groups
    split = weight.reshape(transposed_groups, rows, *weight.shape[1:])
    factor = scale.reshape(transposed_groups, 1, -1, *[1] * (weight.ndim - 2))
    return (split * factor).reshape(weight.shape)


def fold_norm(
    weight: Tensor, bias: Tensor | None, norm: NormState, transposed_groups: int | None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does both, computed in float64.

    Returns:
        Weight and bias, in the weight's type.
    """
    gamma, beta, mean, variance, eps = norm
    wide: NormState = (
        None if gamma is None else gamma.double(),
        None if beta is None else beta.double(),
        mean.double(),
        variance.double(),
        eps,
    )
    scale = gains(wide)
    shift = -wide[2] if bias is None else bias.double() - wide[2]
    shift = shift * scale + (0 if wide[1] is None else wide[1])
    folded = scale_outputs(weight.double(), scale, transposed_groups)
    return folded.to(weight.dtype), shift.to(weight.dtype)


def broadcast(values: Tensor, rank: int) -> Tensor:
    """Per-channel values against a batch of feature maps."""
    return torch.reshape(values, (1, -1, *[1] * (rank - 2)))
