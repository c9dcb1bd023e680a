"""k-means of short vectors, for tables whose entries span several weights.

Greedy k-means++ (Arthur and Vassilvitskii, SODA 2007) on a small importance sample (lightweight
coreset: Bachem, Lucic and Krause, KDD 2018), over-relaxed Lloyd steps whose centroids are shaken
by fading noise (stochastic relaxation: Zeger, Vaisey and Gersho, IEEE T-SP 1992), then plain steps
until the error settles. Deterministic for a seed, whatever the number of threads. On a torch device
(`graphopt.numerics.kmeans_nd_device`) each step assigns all vectors there; drawing and seeding stay on
the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from graphopt.errors import CompressionError
from graphopt.extras import deferred
from graphopt.numerics.device import chosen_device
from graphopt.numerics.kmeans_nd_device import CHUNK, Assigned, DevicePoints, Points
from graphopt.numerics.parallel import map_tasks

if TYPE_CHECKING:
    from graphopt.numerics import kernels_vectors as kernels
else:
    kernels = deferred("graphopt.numerics.kernels_vectors")

__all__ = ["VectorSearch", "cluster_vectors"]

_SEEDING_SAMPLE = 4_096
_SAMPLE = 131_072  # larger groups are annealed on a sample
_RELAXATION = 1.8  # step length relative to Lloyd's
_NOISE = 0.3  # initial noise relative to the spread of a cluster

_Array = NDArray[np.float32]


@dataclass(frozen=True)
class VectorSearch:
    """How long a clustering is looked for.

    Attributes:
        max_steps: Number of steps with noise, and the largest number of those without.
        tolerance: Stop when a step without noise changes the error by a smaller fraction.
        trials: Candidates of each seeded centroid.
        starts: Clusterings with draws of their own; the one of least error is kept.
    """

    max_steps: int = 100
    tolerance: float = 1e-5
    trials: int = 8
    starts: int = 1


def cluster_vectors(
    vectors: Tensor,
    k: int,
    *,
    weights: Tensor | None = None,
    seed: int = 0,
    search: VectorSearch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster each group's vectors into `k` centroids.

    Args:
        vectors: [groups, n, d], floating point.
        k: Number of centroids, 1 … 256.
        weights: Weight of each vector's squared error, [groups, n].
        seed: Seed of the initial centroids and of the noise.
        search: How long to look; the defaults of `VectorSearch` when None.

    Returns:
        Tables [groups, k, d] in the dtype of `vectors`, indices [groups, n] uint8, and the sum of
        squared errors [groups] float64.

    Raises:
        CompressionError: A value is NaN or infinite, or a weight is that or negative.
    """
    how, device = VectorSearch() if search is None else search, chosen_device()
    if not torch.isfinite(vectors).all():
        raise CompressionError("values contain NaN or Inf")
    if weights is not None and not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise CompressionError("sensitivities must be finite and not negative")

    def cluster(number: int) -> tuple[Tensor, Tensor, Tensor]:
        tried = (cluster_from(number, start) for start in range(how.starts))
        return min(tried, key=lambda found: float(found[2]))

    def cluster_from(number: int, attempt: int) -> tuple[Tensor, Tensor, Tensor]:
        raw = vectors[number].detach().cpu().double()
        unit = raw.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)
        x = np.ascontiguousarray((raw / unit).float().T.numpy())
        given = torch.ones(len(raw)) if weights is None else weights[number].detach().cpu()
        mass = given.double() / given.amax() if given.amax() > 0 else torch.ones(len(raw)).double()
        w = mass.float().numpy()
        points = _points_on(device)
        random = np.random.default_rng([seed, number, attempt] if attempt else [seed, number])
        xs, ws = _sample(x, w, _SAMPLE, random)
        start = _initial(xs, ws, k, how.trials, random)
        few = points(xs, ws)
        table = _anneal(few, start, how.max_steps, how.max_steps, how.tolerance, random)
        every = few if xs is x else points(x, w)
        if xs is not x:
            table = _anneal(every, table, 0, how.max_steps // 8, how.tolerance, random)
        stored = (torch.from_numpy(table).double() * unit).to(vectors.dtype)
        index = every.nearest((stored.double() / unit).float().numpy()).codes()
        distance = (raw - stored.double()[index]).square().sum(1)
        error = (distance * given.double()).numpy().sum()  # torch's sum depends on the threads
        return stored, index.to(torch.uint8), torch.tensor(error)

    tables, indices, errors = zip(*map_tasks(cluster, range(len(vectors))), strict=True)
    home = vectors.device
    return torch.stack(tables).to(home), torch.stack(indices).to(home), torch.stack(errors)


def _points_on(device: torch.device | None) -> Callable[[_Array, _Array], Points]:
    return _HostPoints if device is None else partial(DevicePoints, device)


def _sample(x: _Array, w: _Array, size: int, random: np.random.Generator) -> tuple[_Array, _Array]:
    """A reweighted sample, half drawn by weight, half by error; it keeps tables' expected error."""
    if x.shape[1] <= size:
        return x, w
    mass = w.astype(np.float64)
    spread = np.square(x - ((x * w).sum(1) / w.sum())[:, None]).sum(0) * mass
    chance = mass / mass.sum() + spread / max(spread.sum(), 1e-300)
    cumulative = chance.cumsum()
    draws = (np.arange(size) + random.random(size)) / size
    at = np.searchsorted(cumulative, draws * cumulative[-1])
    at = np.minimum(at, len(w) - 1)
    return np.ascontiguousarray(x[:, at]), (mass[at] / chance[at]).astype(np.float32)


def _initial(x: _Array, w: _Array, k: int, trials: int, random: np.random.Generator) -> _Array:
    xs, ws = _sample(x, w, _SEEDING_SAMPLE, random)
    return xs[:, kernels.seed_vectors((0,) * len(x), xs, ws, k, random.random((k, trials)))].T


class _HostPoints(Points):
    """Vectors that compiled code assigns."""

    @override
    def nearest(self, table: _Array) -> Assigned:
        x, w = self.x, self.w
        (d, n), k = x.shape, len(table)
        padded = np.full((-(-k // 4) * 4, d), np.inf, np.float32)
        padded[:k] = table
        index, distance = np.empty(n, np.int32), np.empty(n, np.float32)

        def run(low: int) -> NDArray[np.float64]:
            moments = np.zeros((k, d + 2))
            high = min(low + CHUNK, n)
            kernels.assign_vectors((0,) * d, x, w, padded, low, high, index, distance, moments)
            return moments

        moments = sum(map_tasks(run, range(0, n, CHUNK)), np.zeros((k, d + 2)))
        return _HostAssigned(moments, index, distance, w)


@dataclass(frozen=True)
class _HostAssigned(Assigned):
    index: NDArray[np.int32]
    distance: _Array
    w: _Array

    @override
    def codes(self) -> Tensor:
        return torch.from_numpy(self.index)

    @override
    def worst(self, count: int) -> NDArray[np.int64]:
        return np.argsort(-self.distance * self.w, kind="stable")[:count]


def _anneal(
    points: Points,
    table: _Array,
    noisy: int,
    plain: int,
    tolerance: float,
    random: np.random.Generator,
) -> _Array:
    """The best table after `noisy` steps with fading noise and up to `plain` without."""
    d = len(points.x)
    best, lowest, before = table, np.inf, np.inf
    for step in range(noisy + plain):
        assigned = points.nearest(table)
        moments = assigned.moments
        mass, error = moments[:, d], moments[:, d + 1].sum()
        safe = np.maximum(mass, 1e-300)[:, None]
        mean = np.where(mass[:, None] > 0, moments[:, :d] / safe, table)
        if error < lowest:
            best, lowest = mean.astype(np.float32), error
        if step > noisy and abs(before - error) <= tolerance * error:
            break
        length = _RELAXATION if step < noisy or error < before else 1.0
        moved = table + length * (mean - table)
        if step < noisy:
            spread = np.sqrt(moments[:, d + 1 :] / safe / d)
            fade = _NOISE * (1.0 - step / noisy) ** 0.5
            moved += fade * spread * random.standard_normal(moved.shape)
        empty = np.flatnonzero(mass <= 0)
        if empty.size:  # an empty cluster takes over the worst-fitted vectors
            worst = assigned.worst(empty.size)
            moved[empty[: worst.size]] = points.x[:, worst].T
        table, before = moved.astype(np.float32), error
    return best
