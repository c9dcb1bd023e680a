"""Compiled inner loops of one-dimensional clustering; all release the GIL and are deterministic.

Points are given as prefix sums at sorted positions: `w[i]` and `wx[i]` are the total weight and the
weighted sum of everything left of position `i`. The distortion of a partition differs from
`−Σ (ΔWX)²/ΔW` by a constant, so the programs maximise that sum.
"""

from __future__ import annotations

import numpy as np

from graphopt.numerics.compiled import compiled
from graphopt.numerics.kernels_cuts import optimal_cuts, refine_cuts, table_cuts

__all__ = ["cut_groups", "fit_groups"]

_jit = compiled()


@_jit
def _centroids(w, wx, bounds, shift, grid, q_min, q_max, first, table):
    """Mean of each part into `table`; an empty part repeats the entry before it."""
    last = first
    for part in range(bounds.size - 1):
        mass = w[bounds[part + 1]] - w[bounds[part]]
        if mass > 0.0:
            last = (wx[bounds[part + 1]] - wx[bounds[part]]) / mass
            if grid > 0.0:
                last = grid * min(max(np.rint(last / grid), q_min), q_max)
            last += shift
        table[part] = last


@_jit
def fit_groups(value, weight, ks, cells, grid, q_min, q_max, tables):
    """Fit tables of every size in `ks` to each row of sorted points.

    Args:
        value: Sorted points, [groups, m] float32 or float64.
        weight: Their weights, same shape, or [0, 0] for ones; not negative.
        ks: Increasing table sizes, int64.
        cells: Places between which the exact program chooses cuts; at `m` or above it is exact,
            below it the cuts are refined afterwards to single points.
        grid: Step of the centroid grid of each group, float64 [groups]; 0 is no grid.
        q_min: Lowest grid level.
        q_max: Highest grid level.
        tables: Output, [groups, sum(ks)] float64; the tables of one group side by side.
    """
    groups, most = value.shape
    k_max = ks[ks.size - 1]
    distinct = np.empty(most)
    ones = np.empty(0)
    sums = np.empty(most + 1)
    moments = np.empty(most + 1)
    edges = np.empty(min(cells, most) + 1, dtype=np.int64)
    for g in range(groups):
        # moments about a value in the midst lose no digits to an offset
        shift = 0.0 if grid[g] > 0.0 else np.float64(value[g, most // 2])
        m = _fill(value[g], weight[g] if weight.size else ones, shift, distinct, sums, moments)
        points = distinct[:m]
        w = sums[: m + 1]
        wx = moments[: m + 1]
        n_edges = _companding_edges(points, w, cells, edges)
        used = edges[:n_edges]
        cut, _ = optimal_cuts(w[used], wx[used], k_max, grid[g], q_min, q_max)
        at = 0
        for k in ks:
            bounds = table_cuts(cut, k, used)
            if k > 1 and n_edges - 1 < m:
                # three cells each way: the program over cells is never further off
                reach = max(3 * m // (n_edges - 1), 16)
                refine_cuts(w, wx, bounds, reach, grid[g], q_min, q_max)
            table = tables[g, at : at + k]
            _centroids(w, wx, bounds, shift, grid[g], q_min, q_max, points[0], table)
            for part in range(k):
                if grid[g] <= 0.0 and bounds[part] < bounds[part + 1]:
                    low = points[bounds[part]]
                    if low == points[bounds[part + 1] - 1]:
                        table[part] = low
            at += k


@_jit
def _fill(value, weight, shift, distinct, w, wx):
    """Prefix sums over the distinct points that weigh something; how many they are.

    Args:
        value: Increasing, [m].
        weight: [m], or [0] for ones; one at least is above 0.
        shift: What moments are taken about.
        distinct: Output, [m]: the points.
        w: Output, [m + 1]: prefix sums of weights.
        wx: Output, [m + 1]: prefix sums of weight · (value − shift).
    """
    count = 0
    total = 0.0
    moment = 0.0
    w[0] = 0.0
    wx[0] = 0.0
    for i in range(value.size):
        mass = weight[i] if weight.size else 1.0
        if mass > 0.0:
            if count == 0 or distinct[count - 1] != value[i]:
                distinct[count] = value[i]
                count += 1
            total += mass
            moment += mass * (value[i] - shift)
            w[count] = total
            wx[count] = moment
    return count


@_jit
def cut_groups(w, wx, ks, grid, q_min, q_max):
    """Centroids (less the shift) of the best cuts of each row of prefix sums.

    Args:
        w: Prefix sums of weights at the candidate cuts, [groups, cells + 1] float64.
        wx: Prefix sums of weighted values there.
        ks: Increasing table sizes.
        grid: Step of the centroid grid of each group; 0 is no grid.
        q_min: Lowest grid level.
        q_max: Highest grid level.

    Returns:
        [groups, sum(ks)] float64, the tables of one group side by side.
    """
    groups = w.shape[0]
    identity = np.arange(w.shape[1])
    tables = np.zeros((groups, ks.sum()))
    for g in range(groups):
        cut, _ = optimal_cuts(w[g], wx[g], ks[ks.size - 1], grid[g], q_min, q_max)
        at = 0
        for k in ks:
            bounds = table_cuts(cut, k, identity)
            table = tables[g, at : at + k]
            _centroids(w[g], wx[g], bounds, 0.0, grid[g], q_min, q_max, 0.0, table)
            at += k
    return tables


@_jit
def _companding_edges(points, w, cells, edges):
    """Positions that cut the points into cells of about equal share of ∫ p^(1/3) dx.

    That density of cells is the asymptotically best one for squared error (Panter and Dite 1951).
    """
    m = points.size
    if m <= cells:
        for i in range(m + 1):
            edges[i] = i
        return m + 1
    stride = max(m // max(3 * cells, 512), 1)
    blocks = -(-(m - 1) // stride)
    whole = 0.0
    together = np.empty(blocks)
    for b in range(blocks):
        end = min((b + 1) * stride, m - 1)
        gap = points[end] - points[b * stride]
        together[b] = np.cbrt((w[end] - w[b * stride]) * gap * gap)
        whole += together[b]
    # blocks that may hold several cells, as in a long tail, are taken point by point
    place = np.empty(m, dtype=np.int64)
    share = np.empty(m)
    units = 0
    for b in range(blocks):
        start = b * stride
        end = min(start + stride, m - 1)
        if together[b] * cells <= whole or end == start + 1:
            place[units] = end
            share[units] = together[b]
            units += 1
            continue
        for i in range(start + 1, end + 1):
            gap = points[i] - points[i - 1]
            place[units] = i
            share[units] = np.cbrt((w[i] - w[i - 1]) * gap * gap)
            units += 1
    # no gap, however long, is worth more than the one cut that it gets
    limit = whole
    for _ in range(16):
        total = 0.0
        for u in range(units):
            total += min(share[u], limit)
        if limit <= 1.01 * total / cells:
            break
        limit = total / cells
    edges[0] = 0
    count = 1
    done = 0.0
    target = total / cells
    for u in range(units):
        done += min(share[u], limit)
        if count < cells and done >= target * (1.0 - 1e-12):
            edges[count] = place[u]
            count += 1
            target = done + (total - done) / max(cells - count + 1, 1)
    edges[count] = m
    return count + 1
