"""Compiled search for the clipping ranges of integers; it releases the GIL."""

from __future__ import annotations

import numpy as np

from graphopt.numerics.compiled import compiled

__all__ = ["shrink_ranges"]

_BLOCK = 4096  # elements whose errors are summed in float32
_jit = compiled(fastmath={"contract", "reassoc", "nsz"})


@_jit
def _error(x, weights, weighed, low, high, grid):
    """Squared error of rounding a group whose range is [low, high]; see `qparams`."""
    q_min, q_max, middle, tiny, both = grid
    if both > 0:
        scale = high / (q_max - q_min) - low / (q_max - q_min)
    else:
        scale = max(-low / (middle - q_min), high / (q_max - middle))
    scale = np.float32(1.0) if scale == 0 else max(scale, tiny)
    offset = middle
    if both > 0:
        offset = min(max(np.rint(q_min - low / scale), q_min), q_max)
    turned = np.float32(1.0) / scale
    # a clamp before the offset is added is one operation less
    below = q_min - offset
    above = q_max - offset
    total = 0.0
    for start in range(0, x.shape[0], _BLOCK):
        stop = min(start + _BLOCK, x.shape[0])
        part = np.float32(0.0)
        if weighed:
            for i in range(start, stop):
                gap = x[i] - min(max(np.rint(x[i] * turned), below), above) * scale
                part += weights[i] * gap * gap
        else:
            for i in range(start, stop):
                gap = x[i] - min(max(np.rint(x[i] * turned), below), above) * scale
                part += gap * gap
        total += part
    return total


@_jit
def shrink_ranges(values, weights, shares, grid, span, lows, highs):
    """Shrink the ranges of a span of groups of `values` where that lowers their errors.

    Both ends together, then each alone where they count apart, then finer steps around the best: the
    order of `graphopt.numerics.clipping._search`.

    Args:
        values: [groups, elements] float32.
        weights: The same shape, or [1, 1] where all errors count 1.
        shares: Shares of the range, and what is added to the best of them, float32 each.
        grid: Smallest and largest stored value, the middle of the grid, the smallest scale, and 1 where
            both ends count; float32.
        span: First group, and the one behind the last.
        lows: [groups] float32, lower ends at most 0, replaced.
        highs: Upper ends at least 0, replaced.
    """
    weighed = weights.shape[0] == values.shape[0] and weights.shape[1] == values.shape[1]
    one = np.float32(1.0)
    coarse, fine = shares
    limits = (grid[0], grid[1], grid[2], grid[3], grid[4])
    for g in range(span[0], span[1]):
        x = values[g]
        w = weights[g] if weighed else weights[0]
        low = lows[g]
        high = highs[g]
        best = np.float64(np.inf)
        left = one
        right = one
        for stage in range(6):
            if grid[4] == 0 and stage in (1, 2, 4, 5):
                continue
            steps = coarse if stage < 3 else fine
            base_left = left
            base_right = right
            for step in steps:
                a = base_left
                b = base_right
                if stage < 3:
                    a = base_left if stage == 2 else step
                    b = base_right if stage == 1 else step
                else:
                    if stage != 5:
                        a = min(base_left + step, one)
                    if stage != 4:
                        b = min(base_right + step, one)
                error = _error(x, w, weighed, low * a, high * b, limits)
                if error < best:
                    best = error
                    left = a
                    right = b
        lows[g] = low * left
        highs[g] = high * right
