"""Compiled inner loops of error feedback with table entries along columns; all release the GIL.

Weights are held column-major, `w[column, row]`, in tasks of a few dozen rows. A code belongs to one row
and to a unit of consecutive columns, as many as a table entry has values; its table is
`row_table[row] + col_table[unit]`. `axes` is a tuple of that length, a constant of its type, so that
loops over it unroll and those over rows become SIMD.
"""

from __future__ import annotations

import numpy as np

from graphopt.numerics.compiled import compiled

__all__ = ["descend", "feedback", "nearest_entries"]

_ROWS = 64  # in cache while all entries pass by
_jit = compiled(fastmath={"contract", "reassoc", "nsz"})


@_jit
def nearest_entries(axes, y, tables, metric, row_table, offset, at):
    """Codes `at` of the entries nearest to the columns of `y` [d, rows], entries turned by `metric`."""
    d = len(axes)
    rows = y.shape[1]
    k = tables.shape[1]
    # arrays of this function's own, which the compiler knows apart
    entries = np.full(((k + 3) // 4 * 4, d), np.inf, np.float32)
    part = np.empty((d, _ROWS), np.float32)
    best = np.empty(_ROWS, np.float32)
    code = np.empty(_ROWS, np.int32)
    start = 0
    while start < rows:
        stop = start + 1
        while stop < min(rows, start + _ROWS) and row_table[stop] == row_table[start]:
            stop += 1
        table = tables[row_table[start] + offset]
        for j in range(k):
            for a in range(d):
                value = np.float32(0.0)
                for b in range(d):
                    value += table[j, b] * metric[b, a]
                entries[j, a] = value
        size = stop - start
        for a in range(d):
            part[a, :size] = y[a, start:stop]
        best[:] = np.inf
        code[:] = 0
        for j in range(0, entries.shape[0], 4):
            for r in range(size):
                low = best[r]
                at_low = code[r]
                for u in range(4):
                    s = np.float32(0.0)
                    for a in range(d):
                        step = part[a, r] - entries[j + u, a]
                        s += step * step
                    at_low = np.int32(j + u) if s < low else at_low
                    low = s if s < low else low
                best[r] = low
                code[r] = at_low
        at[start:stop] = code[:size]
        start = stop


@_jit
def feedback(axes, w, exact, factor, own, tables, row_table, col_table, codes, errors):
    """Choose codes unit by unit and hand each unit's error on to the later ones.

    With R a unit's block of the Hessian's own factor, an entry q costs `‖(w − q) R‖²` once all later columns
    have made up for it.

    Args:
        axes: Tuple as long as an entry.
        w: [columns, rows] float32, what is wanted with what was handed on before; replaced by the table
            values that were chosen.
        exact: What is wanted, [columns, rows] float32.
        factor: Of `feedback_factor`, [columns, columns] float32.
        own: R of each unit, [units, d, d] float32.
        tables: [tables, k, d] float32.
        row_table: Table of each row.
        col_table: Table offset of each unit.
        codes: Result, [units, rows] uint8.
        errors: Result, [columns, rows] float32: what times a row of the factor is handed on.
    """
    d = len(axes)
    columns, rows = w.shape
    y = np.empty((d, rows), np.float32)
    at = np.empty(rows, np.int32)
    for u in range(columns // d):
        first = u * d
        for a in range(d):
            y[a, :] = 0.0
            for b in range(d):
                gain = own[u, b, a]
                for r in range(rows):
                    y[a, r] += w[first + b, r] * gain
        nearest_entries(axes, y, tables, own[u], row_table, col_table[u], at)
        for r in range(rows):
            table = tables[row_table[r] + col_table[u]]
            code = at[r]
            codes[u, r] = code
            for a in range(d):
                errors[first + a, r] = exact[first + a, r] - table[code, a]
                w[first + a, r] = table[code, a]
        for k in range(first + d, columns):
            for a in range(d):
                gain = factor[first + a, k]
                for r in range(rows):
                    w[k, r] -= gain * errors[first + a, r]


@_jit
def descend(axes, q, slope, hessian, lower, upper, tables, row_table, col_table, codes, moves):
    """One cycle of coordinate descent over the codes; never raises the error.

    With H = LLᵀ a unit's block of the Hessian and g its slope, a change Δ lowers the error most where
    `‖LᵀΔ − L⁻¹g‖` is least.

    Args:
        axes: Tuple as long as an entry.
        q: [columns, rows] float32, the current values; updated.
        slope: H (w − q), [columns, rows] float32; updated.
        hessian: [columns, columns] float32.
        lower: L of each unit, [units, d, d] float32.
        upper: L⁻ᵀ of each unit, [units, d, d] float32.
        tables: [tables, k, d] float32.
        row_table: Table of each row.
        col_table: Table offset of each unit.
        codes: [units, rows] uint8; updated.
        moves: Result, [columns, rows] float32: by how much values have changed.

    Returns:
        Number of codes that changed.
    """
    d = len(axes)
    columns, rows = q.shape
    y = np.empty((d, rows), np.float32)
    at = np.empty(rows, np.int32)
    changes = 0
    for u in range(columns // d):
        first = u * d
        for a in range(d):
            y[a, :] = 0.0
            for b in range(d):
                for r in range(rows):
                    y[a, r] += q[first + b, r] * lower[u, b, a]
                    y[a, r] += slope[first + b, r] * upper[u, b, a]
            moves[first + a, :] = 0.0
        nearest_entries(axes, y, tables, lower[u], row_table, col_table[u], at)
        changed = False
        for r in range(rows):
            code = at[r]
            if code == codes[u, r]:
                continue
            table = tables[row_table[r] + col_table[u]]
            codes[u, r] = code
            changes += 1
            changed = True
            for a in range(d):
                moves[first + a, r] = table[code, a] - q[first + a, r]
                q[first + a, r] = table[code, a]
        if changed:
            for k in range(columns):
                for a in range(d):
                    gain = hessian[first + a, k]
                    for r in range(rows):
                        slope[k, r] -= gain * moves[first + a, r]
    return changes
