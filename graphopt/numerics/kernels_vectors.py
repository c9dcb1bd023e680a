"""Compiled inner loops of vector clustering; all release the GIL and are deterministic.

`axes` is a tuple of length d: its length is a constant of its type, so that loops over the
dimensions unroll and those over vectors become SIMD.
"""

from __future__ import annotations

import numpy as np

from graphopt.numerics.compiled import compiled

__all__ = ["assign_vectors", "seed_vectors"]

_BLOCK = 512  # vectors in cache while all centroids pass by
_jit = compiled(fastmath={"contract"})


@_jit
def assign_vectors(axes, x, w, table, low, high, index, distance, moments):
    """Nearest row of `table` [4·m, d] for vectors `low` … `high` of `x` [d, n].

    Adds weight, weighted sum and weighted error of each cluster into `moments` [k, d + 2].
    """
    d = len(axes)
    part = np.empty((d, _BLOCK), np.float32)
    best = np.empty(_BLOCK, np.float32)
    at = np.empty(_BLOCK, np.int32)
    for start in range(low, high, _BLOCK):
        size = min(_BLOCK, high - start)
        for a in range(d):
            part[a, :size] = x[a, start : start + size]
        best[:] = np.inf
        at[:] = 0
        for j in range(0, table.shape[0], 4):
            for i in range(size):
                low_value = best[i]
                low_index = at[i]
                for u in range(4):
                    s = np.float32(0.0)
                    for a in range(d):
                        step = part[a, i] - table[j + u, a]
                        s += step * step
                    low_index = np.int32(j + u) if s < low_value else low_index
                    low_value = s if s < low_value else low_value
                best[i] = low_value
                at[i] = low_index
        for i in range(size):
            j = at[i]
            mass = np.float64(w[start + i])
            index[start + i] = j
            distance[start + i] = best[i]
            for a in range(d):
                moments[j, a] += mass * part[a, i]
            moments[j, d] += mass
            moments[j, d + 1] += mass * best[i]


@_jit
def seed_vectors(axes, x, w, k, draws):
    """Positions of `k` seeds among `x` [d, n]: each the best of several drawn by their error."""
    n = x.shape[1]
    chosen = np.empty(k, np.int64)
    distance = np.ones(n, np.float32)
    trial = np.empty(n, np.float32)
    kept = np.empty(n, np.float32)
    cumulative = np.empty(n)
    for j in range(k):
        total = 0.0
        for i in range(n):
            total += np.float64(w[i]) * distance[i]
            cumulative[i] = total
        lowest = np.inf
        chosen[j] = 0
        for t in range(draws.shape[1]):
            p = min(np.searchsorted(cumulative, draws[j, t] * total, side="right"), n - 1)
            for i in range(n):
                s = np.float32(0.0)
                for a in range(len(axes)):
                    step = x[a, i] - x[a, p]
                    s += step * step
                trial[i] = s if j == 0 else min(s, distance[i])
            error = 0.0
            for i in range(n):
                error += np.float64(w[i]) * trial[i]
            if error < lowest:
                lowest = error
                chosen[j] = p
                trial, kept = kept, trial
        distance, kept = kept, distance
    return chosen
