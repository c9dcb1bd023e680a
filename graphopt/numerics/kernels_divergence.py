"""Compiled divergence between a histogram and its rounded forms; it releases the GIL."""

from __future__ import annotations

import numpy as np

from graphopt.numerics.compiled import compiled

__all__ = ["divergences"]

_LEAST = 1e-12  # share that a bin has at least, where its logarithm is taken
_jit = compiled()


@_jit
def _times_log(count):
    return count * np.log(count) if count > 0.0 else 0.0


@_jit
def divergences(centres, counts, ends, ratios, levels, result):
    """`Σ P log(P / Q)` for ranges that are shares of one range.

    Args:
        centres: [bins] float32, middles of the bins, ascending.
        counts: [bins] float64.
        ends: Ends of the whole range, float32.
        ratios: [ranges] float32, share of the range that is kept.
        levels: Number of levels that a range is divided into.
        result: [ranges] float64, replaced; infinite where no bin lies within.
    """
    bins = centres.size
    before = np.zeros(bins + 1)  # counts of the bins left of one, and Σ c log c
    logs = np.zeros(bins + 1)
    for i in range(bins):
        before[i + 1] = before[i] + counts[i]
        logs[i + 1] = logs[i] + _times_log(counts[i])
    total = before[bins]
    tiny = np.finfo(np.float32).tiny
    sums = np.zeros(levels)
    filled = np.zeros(levels)
    for r in range(ratios.size):
        first = ends[0] * ratios[r]
        last = ends[1] * ratios[r]
        lowest = np.searchsorted(centres, first, "left")
        highest = np.searchsorted(centres, last, "right") - 1
        if highest < lowest:
            result[r] = np.inf
            continue
        width = max((last - first) / np.float32(levels), tiny)
        sums[:] = 0.0
        filled[:] = 0.0
        for i in range(lowest, highest + 1):
            if counts[i] > 0.0:
                level = min(max(np.int64((centres[i] - first) / width), 0), levels - 1)
                sums[level] += counts[i]
                filled[level] += 1.0
        inside = before[highest + 1] - before[lowest]
        # what lies outside is counted in the outermost bins
        left = counts[lowest] + before[lowest]
        right = counts[highest] + (total - before[highest + 1])
        if lowest == highest:
            left = total
        own = logs[highest + 1] - logs[lowest] - _times_log(counts[lowest]) + _times_log(left)
        if lowest != highest:
            own += _times_log(right) - _times_log(counts[highest])
        scale = 1.0 / max(inside, 1.0)
        cross = 0.0
        for level in range(levels):
            if filled[level] > 0.0:
                share = max(sums[level] / filled[level] * scale, _LEAST)
                cross += sums[level] * np.log(share)
        for place in range(2):
            i = lowest if place == 0 else highest
            more = left - counts[i] if place == 0 else right - counts[i]
            if place == 1 and lowest == highest:
                more = 0.0
            if more > 0.0:
                share = _LEAST
                if counts[i] > 0.0:
                    level = min(max(np.int64((centres[i] - first) / width), 0), levels - 1)
                    share = max(sums[level] / filled[level] * scale, _LEAST)
                cross += more * np.log(share)
        mass = max(total, 1.0)
        result[r] = (own - total * np.log(mass) - cross) / mass
