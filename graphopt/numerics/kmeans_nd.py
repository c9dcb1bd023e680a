"""k-means of short vectors, for tables whose entries span several weights.

k-means++ seeding (Arthur and Vassilvitskii, SODA 2007) on a sample, then Lloyd's iteration with
distances from one matrix product per block. Deterministic for a seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.errors import CompressionError

__all__ = ["cluster_vectors"]

_SEEDING_SAMPLE = 16_384
_BLOCK = 8_192


def cluster_vectors(
    vectors: Tensor,
    k: int,
    *,
    weights: Tensor | None = None,
    seed: int = 0,
    max_steps: int = 60,
    tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster each group's vectors into `k` centroids.

    Args:
        vectors: [groups, n, d], floating point.
        k: Number of centroids, 1 … 256.
        weights: Weight of each vector's squared error, [groups, n].
        seed: Seed of the initial centroids.
        max_steps: Largest number of Lloyd steps.
        tolerance: Stop when a step lowers the error by a smaller fraction.

    Returns:
        Tables [groups, k, d] in the dtype of `vectors`, indices [groups, n] uint8, and the sum of
        squared errors [groups] float64.

    Raises:
        CompressionError: A value is NaN or infinite.
    """
    if not torch.isfinite(vectors).all():
        raise CompressionError("values contain NaN or Inf")
    tables, indices, errors = [], [], []
    for number, group in enumerate(vectors):
        mass = None if weights is None else weights[number].float()
        generator = torch.Generator(device="cpu").manual_seed(seed + number)
        raw = group.detach().to(torch.float64)
        unit = raw.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)
        x = (raw / unit).float()
        table = _lloyd(x, _seed_centroids(x, k, mass, generator), mass, max_steps, tolerance)
        stored = (table.double() * unit).to(vectors.dtype)
        index, _ = _nearest(x, (stored.double() / unit).float())
        distance = (raw - stored.double()[index]).square().sum(1)
        tables.append(stored)
        indices.append(index.to(torch.uint8))
        total = distance.double() if mass is None else distance.double() * mass.double()
        errors.append(total.sum())
    return torch.stack(tables), torch.stack(indices), torch.stack(errors)


def _seed_centroids(x: Tensor, k: int, mass: Tensor | None, generator: torch.Generator) -> Tensor:
    n = x.shape[0]
    if n > _SEEDING_SAMPLE:
        chosen = torch.randperm(n, generator=generator)[:_SEEDING_SAMPLE].to(x.device)
        x = x[chosen]
        mass = None if mass is None else mass[chosen]
    first = int(torch.randint(x.shape[0], (1,), generator=generator))
    centroids = [x[first]]
    distance = (x - x[first]).square().sum(1)
    draws = torch.rand(k, generator=generator)
    for step in range(1, k):
        score = distance if mass is None else distance * mass
        total = score.double().cumsum(0)
        if total[-1] <= 0:
            centroids.extend([x[first]] * (k - step))
            break
        at = int(torch.searchsorted(total, total[-1] * draws[step].double()))
        at = min(at, x.shape[0] - 1)
        centroids.append(x[at])
        distance = torch.minimum(distance, (x - x[at]).square().sum(1))
    return torch.stack(centroids)


def _lloyd(
    x: Tensor, table: Tensor, mass: Tensor | None, max_steps: int, tolerance: float
) -> Tensor:
    k = table.shape[0]
    weight = torch.ones(x.shape[0], device=x.device) if mass is None else mass
    weighted = x * weight[:, None]
    before = float("inf")
    for _ in range(max_steps):
        index, distance = _nearest(x, table)
        total = torch.zeros(k, device=x.device).index_add_(0, index, weight)
        moment = torch.zeros_like(table).index_add_(0, index, weighted)
        table = torch.where(total[:, None] > 0, moment / total.clamp_min(1e-30)[:, None], table)
        empty = (total <= 0).nonzero()[:, 0]
        if empty.numel():
            # an empty cluster takes over the worst-fitted vectors
            worst = (distance * weight).topk(min(empty.numel(), x.shape[0])).indices
            table[empty[: worst.numel()]] = x[worst]
        error = float((distance * weight).sum())
        if error >= before * (1 - tolerance):
            break
        before = error
    return table


def _nearest(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Index of and squared distance to the nearest centroid of each vector."""
    half_norm = 0.5 * table.square().sum(1)
    index = torch.cat(
        [torch.addmm(half_norm, part, table.T, alpha=-1).argmin(1) for part in x.split(_BLOCK)]
    )
    return index, (x - table[index]).square().sum(1)
