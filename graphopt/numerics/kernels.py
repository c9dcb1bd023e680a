"""Compiled inner loops of one-dimensional clustering; all release the GIL and are deterministic.

Points are given as prefix sums at sorted positions: `w[i]` and `wx[i]` are the total weight and the
weighted sum of everything left of position `i`. The distortion of a partition differs from
`−Σ (ΔWX)²/ΔW` by a constant, so the programs below maximise that sum. With `grid > 0` centroids are
confined to `grid · {q_min … q_max}` and each part pays `ΔW · (μ − grid(μ))²` more; the objective
stays Monge, so the optimal cut of a longer prefix never lies further left and the search is
monotone.
"""

from __future__ import annotations

import numpy as np

from graphopt.numerics.compiled import compiled

__all__ = [
    "cut_groups",
    "fill_prefix",
    "fit_groups",
    "optimal_cuts",
    "refine_cuts",
    "table_cuts",
]

_jit = compiled()


@_jit
def fill_prefix(value, weight, shift, w, wx):
    """Prefix sums of `weight` and `weight · (value − shift)`, both starting with 0."""
    w[0] = 0.0
    wx[0] = 0.0
    for i in range(value.size):
        w[i + 1] = w[i] + weight[i]
        wx[i + 1] = wx[i] + weight[i] * (value[i] - shift)


@_jit
def _gain(w, wx, i, j, grid, q_min, q_max):
    mass = w[j] - w[i]
    if mass <= 0.0:
        return 0.0
    moment = wx[j] - wx[i]
    if grid <= 0.0:
        return moment * moment / mass
    mean = moment / mass
    level = grid * min(max(np.rint(mean / grid), q_min), q_max)
    return mass * (2.0 * mean - level) * level


@_jit
def _best_start(best, base, w, wx, first, last, j, grid, q_min, q_max):
    """Where the last part of the first `j` points starts best, among `first` … `last`."""
    if grid > 0.0:
        at = first
        value = -np.inf
        for i in range(first, last + 1):
            candidate = best[i - base] + _gain(w, wx, i, j, grid, q_min, q_max)
            if candidate > value:
                value = candidate
                at = i
        return value, at
    mass_j = w[j] + 1e-300
    moment_j = wx[j]
    at = first
    value = -np.inf
    for i in range(first, last + 1):
        moment = moment_j - wx[i]
        candidate = best[i - base] + moment * moment / (mass_j - w[i])
        if candidate > value:
            value = candidate
            at = i
    return value, at


@_jit
def optimal_cuts(w, wx, k_max, grid, q_min, q_max):
    """Best cuts of the points into 1 … k_max parts, all in one run.

    Returns:
        `cut[k, j]`, the start of the last part when the first `j` points form `k + 1` parts, and
        `gain[k]`, the objective of `k + 1` parts over all points. O(k_max · m · log m).
    """
    m = w.size - 1
    cut = np.zeros((k_max, m + 1), dtype=np.int32)
    gain = np.zeros(k_max)
    best = np.empty(m + 1)
    for j in range(m + 1):
        best[j] = _gain(w, wx, 0, j, grid, q_min, q_max)
    gain[0] = best[m]
    following = np.empty(m + 1)
    stack = np.empty((64, 4), dtype=np.int64)
    for k in range(1, k_max):
        for j in range(min(k + 1, m + 1)):
            following[j] = best[j]
            cut[k, j] = min(j, k)
        top = 0
        if m > k:
            stack[0, 0] = k + 1
            stack[0, 1] = m
            stack[0, 2] = k
            stack[0, 3] = m - 1
            top = 1
        while top:
            top -= 1
            left = stack[top, 0]
            right = stack[top, 1]
            first = stack[top, 2]
            last = stack[top, 3]
            middle = (left + right) // 2
            value, at = _best_start(
                best, 0, w, wx, first, min(last, middle - 1), middle, grid, q_min, q_max
            )
            following[middle] = value
            cut[k, middle] = at
            if left < middle:
                stack[top, 0] = left
                stack[top, 1] = middle - 1
                stack[top, 2] = first
                stack[top, 3] = at
                top += 1
            if middle < right:
                stack[top, 0] = middle + 1
                stack[top, 1] = right
                stack[top, 2] = at
                stack[top, 3] = last
                top += 1
        best, following = following, best
        gain[k] = best[m]
    return cut, gain


@_jit
def table_cuts(cut, k, edges):
    """Follow `cut` back from the end: positions (in `edges` units) that bound `k` parts."""
    bounds = np.empty(k + 1, dtype=np.int64)
    j = edges.size - 1
    bounds[k] = edges[j]
    for part in range(k - 1, 0, -1):
        j = cut[part, j]
        bounds[part] = edges[j]
    bounds[0] = edges[0]
    return bounds


@_jit
def refine_cuts(w, wx, bounds, reach, grid, q_min, q_max):
    """Move every cut of `bounds`, in place, to the jointly best single points near it.

    An exact program in which each cut may move by up to `reach` points, but not past its
    neighbours, so that it costs O(m · log m) at most for any number of parts. It is repeated around
    the new cuts as long as one of them lies at the rim of its window, sixteen times at most.
    """
    parts = bounds.size - 1
    low = np.empty(parts, dtype=np.int64)
    high = np.empty(parts, dtype=np.int64)
    offset = np.empty(parts + 1, dtype=np.int64)
    stack = np.empty((64, 4), dtype=np.int64)
    for _ in range(16):
        offset[1] = 0
        widest = 0
        for k in range(1, parts):
            low[k] = max(bounds[k] - reach, bounds[k - 1])
            high[k] = min(bounds[k] + reach, bounds[k + 1])
            offset[k + 1] = offset[k] + high[k] - low[k] + 1
            widest = max(widest, high[k] - low[k] + 1)
        back = np.empty(offset[parts], dtype=np.int32)
        best = np.empty(widest)
        following = np.empty(widest)
        for j in range(low[1], high[1] + 1):
            best[j - low[1]] = _gain(w, wx, bounds[0], j, grid, q_min, q_max)
        for k in range(2, parts):
            base = low[k - 1]
            stack[0, 0] = low[k]
            stack[0, 1] = high[k]
            stack[0, 2] = base
            stack[0, 3] = high[k - 1]
            top = 1
            while top:
                top -= 1
                left = stack[top, 0]
                right = stack[top, 1]
                first = stack[top, 2]
                last = stack[top, 3]
                middle = (left + right) // 2
                value, at = _best_start(
                    best, base, w, wx, first, min(last, middle), middle, grid, q_min, q_max
                )
                following[middle - low[k]] = value
                back[offset[k] + middle - low[k]] = at
                if left < middle:
                    stack[top, 0] = left
                    stack[top, 1] = middle - 1
                    stack[top, 2] = first
                    stack[top, 3] = at
                    top += 1
                if middle < right:
                    stack[top, 0] = middle + 1
                    stack[top, 1] = right
                    stack[top, 2] = at
                    stack[top, 3] = last
                    top += 1
            best, following = following, best
        base = low[parts - 1]
        end = bounds[parts]
        value = -np.inf
        at = base
        for i in range(base, high[parts - 1] + 1):
            candidate = best[i - base] + _gain(w, wx, i, end, grid, q_min, q_max)
            if candidate > value:
                value = candidate
                at = i
        rim = False
        for k in range(parts - 1, 0, -1):
            rim |= at != bounds[k] and (at == low[k] or at == high[k])
            bounds[k] = at
            if k > 1:
                at = back[offset[k] + at - low[k]]
        if not rim:
            break


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
        value: Sorted points, [groups, m] float64.
        weight: Their weights, same shape, or [0, 0] for ones; not negative.
        ks: Increasing table sizes, int64.
        cells: Places between which the exact program chooses cuts; at `m` or above it is exact,
            below it the cuts are refined afterwards to single points.
        grid: Step of the centroid grid of each group, float64 [groups]; 0 is no grid.
        q_min: Lowest grid level.
        q_max: Highest grid level.
        tables: Output, [groups, sum(ks)] float64; the tables of one group side by side.
    """
    groups, m = value.shape
    k_max = ks[ks.size - 1]
    w = np.empty(m + 1)
    wx = np.empty(m + 1)
    ones = np.ones(m) if weight.size == 0 else np.empty(0)
    edges = np.empty(min(cells, m) + 1, dtype=np.int64)
    for g in range(groups):
        points = value[g]
        mass = weight[g] if weight.size else ones
        shift = 0.0
        if grid[g] <= 0.0:
            total = 0.0
            moment = 0.0
            for i in range(m):
                total += mass[i]
                moment += mass[i] * points[i]
            if total > 0.0:
                shift = moment / total
        fill_prefix(points, mass, shift, w, wx)
        n_edges = _companding_edges(points, w, cells, edges)
        used = edges[:n_edges]
        cut, _ = optimal_cuts(w[used], wx[used], k_max, grid[g], q_min, q_max)
        at = 0
        for k in ks:
            bounds = table_cuts(cut, k, used)
            if k > 1 and n_edges - 1 < m:
                # six cells each way: the program over cells is never further off
                reach = max(6 * m // (n_edges - 1), 16)
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
