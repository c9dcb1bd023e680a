"""Cross terms: what two candidates cost together beyond what each costs alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Matrix", "cross_terms"]

Matrix = npt.NDArray[np.float64]


def cross_terms(
    vectors: Matrix, owners: Sequence[int], losses: Sequence[float] | None = None
) -> Matrix:
    """Cross terms Q of candidates: the loss of a choice x is `½ xᵀQx`.

    `Q_ij = ρ_ij √(m_i m_j)` with m twice the loss of a candidate alone and ρ the correlations of the
    vectors. Few vectors make correlations between layers look larger than they are; those are scaled
    by 1 − λ/2, λ being the shrinkage of least squared error (Schäfer and Strimmer, Statistical
    Applications in Genetics and Molecular Biology 4(1), 2005, equation 8). All of λ ranks whole
    recipes worse where errors have much in common, nothing of it where they have little.

    Args:
        vectors: [samples, n].
        owners: Layer of each candidate, n.
        losses: Measured loss of each candidate alone, n; None takes that of the vectors.

    Returns:
        [n, n].
    """
    mean_squares = np.square(vectors).mean(0)
    scale = np.sqrt(mean_squares)
    still = scale == 0  # of a layer that no gradient reaches, or a candidate that changes nothing
    scale[still] = 1.0
    scaled = vectors / scale
    correlations = scaled.T @ scaled / len(vectors)
    correlations[still, still] = 1.0
    place = np.asarray(owners)
    across = place[:, None] != place[None, :]
    if len(vectors) > 1 and bool(across.any()):
        squares = np.square(scaled)
        spread = squares.T @ squares / len(vectors) - np.square(correlations)
        total = float(np.square(correlations[across]).sum())
        shrinkage = float(spread[across].sum()) / (len(vectors) - 1) / max(total, 1e-300)
        correlations[across] *= 1 - 0.5 * min(shrinkage, 1.0)
    measured = mean_squares
    if losses is not None:
        measured = np.clip(np.nan_to_num(2 * np.asarray(losses), posinf=1e300), 0, None)
    return correlations * np.outer(np.sqrt(measured), np.sqrt(measured))
