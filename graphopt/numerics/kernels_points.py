"""Compiled passes over points and their tables; all release the GIL and are deterministic."""

from __future__ import annotations

import numpy as np

from graphopt.numerics.compiled import compiled

__all__ = [
    "assign_groups",
    "finite_range",
    "histogram_moments",
    "look_up",
    "sum_of_squares",
]

_jit = compiled()


@_jit
def finite_range(x):
    """(min, max, all finite) of a flat float array."""
    low = x[0]
    high = x[0]
    total = 0.0
    for i in range(x.size):
        v = x[i]
        low = min(low, v)
        high = max(high, v)
        total += v * 0.0
    return low, high, total == 0.0


@_jit
def sum_of_squares(x):
    """Σ x², accumulated in float64."""
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


@_jit
def look_up(codes, tables, dense):
    """`dense[g, i] = tables[g, codes[g, i]]`."""
    for g in range(codes.shape[0]):
        table = tables[g]
        for i in range(codes.shape[1]):
            dense[g, i] = table[codes[g, i]]


@_jit
def histogram_moments(x, sample_weight, low, inverse_step, count, total):
    """Add weight and weighted sum of each uniform bin into `count` and `total` (float64)."""
    last = count.size - 1
    if sample_weight.size:
        for i in range(x.size):
            b = max(min(int((x[i] - low) * inverse_step), last), 0)
            count[b] += sample_weight[i]
            total[b] += sample_weight[i] * x[i]
    else:
        for i in range(x.size):
            b = max(min(int((x[i] - low) * inverse_step), last), 0)
            count[b] += 1.0
            total[b] += x[i]


@_jit
def _nearest(x, middle, index):
    """Index of the interval of `middle` (increasing, last is inf) that holds each value."""
    k = middle.size
    if k <= 16:
        for i in range(x.size):
            v = x[i]
            at = 0
            for j in range(k - 1):
                at += v > middle[j]
            index[i] = at
        return
    cells = 4096 if x.size >= 16384 else 256
    low = middle[0]
    high = middle[k - 2]
    if not high > low:
        for i in range(x.size):
            index[i] = 0 if x[i] <= low else k - 1
        return
    scale = cells / (np.float64(high) - np.float64(low))
    if not np.isfinite(scale):
        # the table lies within a few subnormal numbers
        for i in range(x.size):
            at = 0
            while x[i] > middle[at]:
                at += 1
            index[i] = at
        return
    first = np.zeros(cells + 1, dtype=np.uint8)
    at = 0
    for cell in range(1, cells + 1):
        # one cell to the left, so that rounding of the cell number cannot overshoot
        edge = low + (cell - 1) / scale
        while at < k - 1 and middle[at] < edge:
            at += 1
        first[cell] = at
    for i in range(x.size):
        v = x[i]
        cell = int(min(max((np.float64(v) - low) * scale, 0.0), cells))
        at = first[cell]
        while v > middle[at]:
            at += 1
        index[i] = at


@_jit
def assign_groups(x, tables, sample_weight, index, dense, error):
    """Nearest entry of each group's increasing table for each of the group's values.

    Args:
        x: Values, [groups, n] float32.
        tables: [groups, k] float32, each row increasing.
        sample_weight: Weights of the squared errors, [groups, n] float32, or [0, 0].
        index: Output, [groups, n] uint8.
        dense: Output of the same shape as `x`, or [0, 0] when it is not wanted.
        error: Output, [groups] float64: the (weighted) sum of squared errors.
    """
    k = tables.shape[1]
    middle = np.empty(k, dtype=np.float32)
    weighted = sample_weight.size > 0
    for g in range(x.shape[0]):
        table = tables[g]
        for j in range(k - 1):
            middle[j] = np.float32(0.5 * (np.float64(table[j]) + np.float64(table[j + 1])))
        middle[k - 1] = np.inf
        values = x[g]
        chosen = index[g]
        _nearest(values, middle, chosen)
        total = 0.0
        if weighted:
            for i in range(values.size):
                difference = np.float64(values[i]) - np.float64(table[chosen[i]])
                total += np.float64(sample_weight[g, i]) * difference * difference
        else:
            for i in range(values.size):
                difference = np.float64(values[i]) - np.float64(table[chosen[i]])
                total += difference * difference
        error[g] = total
        if dense.size:
            for i in range(values.size):
                dense[g, i] = table[chosen[i]]
