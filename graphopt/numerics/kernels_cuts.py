"""Compiled programs that choose where sorted points are cut into parts, over prefix sums.

With `grid > 0` centroids are confined to `grid · {q_min … q_max}` and each part pays
`ΔW · (μ − grid(μ))²` more; the objective stays Monge, so the optimal cut of a longer prefix never lies
further left and the search is monotone.
"""

from __future__ import annotations

import numpy as np

from graphopt.numerics.compiled import compiled

__all__ = ["optimal_cuts", "refine_cuts", "table_cuts"]

_jit = compiled()

# a written number has a type of its own, for which all that takes it is compiled once more
_int = np.int64
# with m points and k parts, m / 2k² cuts of a point on the mean lie between its bounds
_ORDERED = 10
_STEPS = 16  # places on each side of a cut that a program chooses among


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

    The best last cut moves right with the number of points and with the number of parts (Knuth 1971,
    "Optimum binary search trees"; Yao 1980), so that the cuts of one part less bound the search from the left.
    Many parts leave so little between the bounds that going through the points in order is cheaper than
    halving them.

    Returns:
        `cut[k, j]`, the start of the last part when the first `j` points form `k + 1` parts (for
        `k_max` parts of all points only), and `gain[k]`, the objective of `k + 1` parts over all
        points. O(k_max · m · log m).
    """
    m = w.size - 1
    cut = np.zeros((k_max, m + 1), dtype=np.int32)
    gain = np.zeros(k_max)
    best = np.empty(m + 1)
    for j in range(m + 1):
        best[j] = _gain(w, wx, _int(0), j, grid, q_min, q_max)
    gain[0] = best[m]
    following = np.empty(m + 1)
    stack = np.empty((64, 4), dtype=np.int64)
    for k in range(1, k_max):
        for j in range(min(k + 1, m + 1)):
            following[j] = best[j]
            cut[k, j] = min(j, k)
        if m > k and (k == k_max - 1 or _ORDERED * k * k > m):
            last = m - 1
            for j in range(m, m - 1 if k == k_max - 1 else k, -1):
                first = min(max(k, cut[k - 1, j]), j - 1)
                last = max(min(last, j - 1), first)
                value, last = _best_start(best, _int(0), w, wx, first, last, j, grid, q_min, q_max)
                following[j] = value
                cut[k, j] = last
        elif m > k:
            _halve(best, w, wx, k, cut, following, stack, grid, q_min, q_max)
        best, following = following, best
        gain[k] = best[m]
    return cut, gain


@_jit
def _push_halves(stack, top, middle, at):
    """Put what is left and right of `middle` in place of the range at `top`; the cut at `middle` bounds both.

    A range is its first and last end, and the first and last cut that these may have.

    Returns:
        How many ranges there are.
    """
    left = stack[top, 0]
    right = stack[top, 1]
    first = stack[top, 2]
    last = stack[top, 3]
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
    return top


@_jit
def _halve(best, w, wx, k, cut, following, stack, grid, q_min, q_max):
    """Fill `cut[k]` and `following` by halving the points, each half between the cuts of the other."""
    stack[0, 0] = k + 1
    stack[0, 1] = w.size - 1
    stack[0, 2] = k
    stack[0, 3] = w.size - 2
    top = 1
    while top:
        top -= 1
        left = stack[top, 0]
        right = stack[top, 1]
        first = stack[top, 2]
        last = stack[top, 3]
        middle = (left + right) // 2
        end = min(last, middle - 1)
        start = min(max(first, cut[k - 1, middle]), end)
        value, at = _best_start(best, _int(0), w, wx, start, end, middle, grid, q_min, q_max)
        following[middle] = value
        cut[k, middle] = at
        top = _push_halves(stack, top, middle, at)


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
    """Move every cut of `bounds`, in place, to the jointly best points near it.

    Exact programs in which each cut may move by up to `reach` points, but not past its neighbours: one
    over every sixteenth of the reach, one over the single points around its cuts. Each is repeated
    around the new cuts as long as one of them lies at the rim of its window, sixteen times at most.
    """
    stride = max(reach // _STEPS, 1)
    if stride > 1:
        _move_cuts(w, wx, bounds, reach, stride, grid, q_min, q_max)
    _move_cuts(w, wx, bounds, min(reach, max(2 * stride, _STEPS)), _int(1), grid, q_min, q_max)


@_jit
def _move_cuts(w, wx, bounds, reach, stride, grid, q_min, q_max):
    """Move the cuts by multiples of `stride`, jointly."""
    parts = bounds.size - 1
    offset = np.empty(parts + 1, dtype=np.int64)  # where the places of a cut start
    lowest = np.empty(parts, dtype=np.int64)
    most = (parts - 1) * (2 * (reach // stride) + 1)
    place = np.empty(most, dtype=np.int64)
    mass = np.empty(most + 1)
    moment = np.empty(most + 1)
    back = np.empty(most, dtype=np.int64)
    best = np.empty(2 * (reach // stride) + 1)
    following = np.empty(best.size)
    stack = np.empty((64, 4), dtype=np.int64)
    for _ in range(16):
        offset[1] = 0
        for k in range(1, parts):
            before = min(reach, bounds[k] - bounds[k - 1]) // stride
            behind = min(reach, bounds[k + 1] - bounds[k]) // stride
            lowest[k] = bounds[k] - before * stride
            offset[k + 1] = offset[k] + before + behind + 1
            for i in range(before + behind + 1):
                at = lowest[k] + i * stride
                place[offset[k] + i] = at
                mass[offset[k] + i] = w[at]
                moment[offset[k] + i] = wx[at]
        for j in range(offset[2]):
            best[j] = _gain(w, wx, bounds[0], place[j], grid, q_min, q_max)
        for k in range(2, parts):
            base = offset[k - 1]
            stack[0, 0] = offset[k]
            stack[0, 1] = offset[k + 1] - 1
            stack[0, 2] = base
            stack[0, 3] = offset[k] - 1
            top = 1
            while top:
                top -= 1
                left = stack[top, 0]
                right = stack[top, 1]
                first = stack[top, 2]
                last = stack[top, 3]
                middle = (left + right) // 2
                end = min(last, base + (place[middle] - lowest[k - 1]) // stride)
                value, at = _best_start(
                    best, base, mass, moment, first, end, middle, grid, q_min, q_max
                )
                following[middle - offset[k]] = value
                back[middle] = at
                top = _push_halves(stack, top, middle, at)
            best, following = following, best
        base = offset[parts - 1]
        mass[offset[parts]] = w[bounds[parts]]
        moment[offset[parts]] = wx[bounds[parts]]
        _, at = _best_start(
            best, base, mass, moment, base, offset[parts] - 1, offset[parts], grid, q_min, q_max
        )
        rim = False
        for k in range(parts - 1, 0, -1):
            outermost = at == offset[k] or at == offset[k + 1] - 1
            rim |= outermost and place[at] != bounds[k]
            bounds[k] = place[at]
            if k > 1:
                at = back[at]
        if not rim:
            break
