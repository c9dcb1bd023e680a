"""Compiled inner loops of error feedback with lookup tables; all release the GIL.

Weights are held column-major, `w[column, row]`, in tasks of a few dozen rows, so that one column of
the Hessian's factor serves all rows of a task from the cache. A code belongs to `size`
consecutive rows (the length of a table entry) and one column; its table is
`row_table[unit] + col_table[column]`. Tables of scalars are increasing.
"""

from __future__ import annotations

import numpy as np

from graphopt.numerics.compiled import compiled
from graphopt.numerics.kernels_columns import nearest_entries

__all__ = ["descend", "feedback", "normal_equations"]

_jit = compiled(fastmath={"contract", "reassoc", "nsz"})


@_jit
def _code(value, table):
    """Index of the table entry nearest to a number; entries are increasing."""
    k = table.shape[0]
    if k <= 16:
        code = 0
        for i in range(1, k):
            code += value > 0.5 * (table[i - 1, 0] + table[i, 0])
        return code
    low = 0
    high = k - 1
    while low < high:
        middle = (low + high) // 2
        if value > 0.5 * (table[middle, 0] + table[middle + 1, 0]):
            low = middle + 1
        else:
            high = middle
    return low


@_jit
def _codes(axes, x, tables, row_table, offset, space, at):
    """Codes `at` [units] of the entries nearest to the values `x` [rows] of a column.

    `space` is (values [d, units], identity [d, d]).
    """
    size = len(axes)
    units = at.shape[0]
    if size == 1:
        for u in range(units):
            at[u] = _code(x[u], tables[row_table[u] + offset])
        return
    values, identity = space
    for u in range(units):
        for i in range(size):
            values[i, u] = x[u * size + i]
    nearest_entries(axes, values, tables, identity, row_table, offset, at)


@_jit
def _space(axes, units):
    size = len(axes)
    return np.empty((size, units), np.float32), np.eye(size).astype(np.float32)


@_jit
def feedback(axes, w, exact, factor, tables, row_table, col_table, codes, errors):
    """Choose codes column by column and hand each column's error on to the later ones.

    Args:
        axes: Tuple as long as a table entry.
        w: [columns, rows] float32, what is wanted with what was handed on before; replaced by the table
            values that were chosen.
        exact: What is wanted, [columns, rows] float32.
        factor: Of `feedback_factor`, [columns, columns] float32.
        tables: [tables, k, size] float32.
        row_table: Table of each unit of rows.
        col_table: Table offset of each column.
        codes: Result, [columns, units] uint8.
        errors: Result, [columns, rows] float32: what times a row of the factor is handed on.
    """
    columns, rows = w.shape
    size = len(axes)
    units = rows // size
    at = np.empty(units, np.int32)
    space = _space(axes, units)
    for j in range(columns):
        error = errors[j]
        _codes(axes, w[j], tables, row_table, col_table[j], space, at)
        for u in range(units):
            table = tables[row_table[u] + col_table[j]]
            code = at[u]
            codes[j, u] = code
            for i in range(size):
                r = u * size + i
                error[r] = exact[j, r] - table[code, i]
                w[j, r] = table[code, i]
        for k in range(j + 1, columns):
            gain = factor[j, k]
            for r in range(rows):
                w[k, r] -= gain * error[r]


@_jit
def descend(axes, q, slope, hessian, tables, row_table, col_table, codes, moves):
    """One cycle of coordinate descent over the codes; never raises the error.

    Args:
        axes: Tuple as long as a table entry.
        q: [columns, rows] float32, the current values; updated.
        slope: H (w − q), [columns, rows] float32; updated.
        hessian: [columns, columns] float32 with a positive diagonal.
        tables: [tables, k, size] float32.
        row_table: Table of each unit of rows.
        col_table: Table offset of each column.
        codes: [columns, units] uint8; updated.
        moves: Result, [columns, rows] float32: by how much values have changed.

    Returns:
        Number of codes that changed.
    """
    columns, rows = q.shape
    size = len(axes)
    units = rows // size
    at = np.empty(units, np.int32)
    space = _space(axes, units)
    wanted = np.empty(rows, dtype=np.float32)
    changes = 0
    for j in range(columns):
        move = moves[j]
        inverse = np.float32(1.0) / hessian[j, j]
        for r in range(rows):
            wanted[r] = q[j, r] + slope[j, r] * inverse
            move[r] = 0.0
        moved = False
        _codes(axes, wanted, tables, row_table, col_table[j], space, at)
        for u in range(units):
            code = at[u]
            if code == codes[j, u]:
                continue
            table = tables[row_table[u] + col_table[j]]
            codes[j, u] = code
            changes += 1
            moved = True
            for i in range(size):
                r = u * size + i
                move[r] = table[code, i] - q[j, r]
                q[j, r] = table[code, i]
        if moved:
            for k in range(columns):
                gain = hessian[j, k]
                for r in range(rows):
                    slope[k, r] -= gain * move[r]
    return changes


@_jit
def normal_equations(codes, target, hessian, weight, first, left, right):
    """Add one task's part of the least-squares problem for the entries of its tables.

    For rows with the one table t: `left[t] += f · PᵀHP`, `right[t] += f · PᵀH w`.

    Args:
        codes: [columns, units] uint8.
        target: H w, or H (w − q), [columns, rows] float32.
        hessian: [columns, columns] float32.
        weight: Importance f of each unit.
        first: Table of each unit.
        left: [tables, k, k] float64; added to.
        right: [tables, k, size] float64; added to.
    """
    columns, units = codes.shape
    k, size = right.shape[1], right.shape[2]
    part = np.empty(k)
    for u in range(units):
        t = first[u]
        f = weight[u]
        for i in range(columns):
            part[:] = 0.0
            for j in range(columns):
                part[codes[j, u]] += hessian[i, j]
            a = codes[i, u]
            for b in range(k):
                left[t, a, b] += f * part[b]
            for s in range(size):
                right[t, a, s] += f * target[i, u * size + s]
