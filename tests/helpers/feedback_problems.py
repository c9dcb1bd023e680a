"""Weights, second moments of inputs, tables and maps of entries to elements."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from graphopt.numerics.feedback import TableMap


def second_moment(columns: int, samples: int = 0, seed: int = 1) -> Tensor:
    """Of inputs that a random walk correlates."""
    generator = torch.Generator().manual_seed(seed)
    count = samples or 4 * columns
    noise = torch.randn(count, columns, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-0.5, 0.5, columns, dtype=torch.float64)
    x = (noise.cumsum(1) / math.sqrt(columns) + 0.3 * noise) * scale
    return (x.T @ x / count).float()


def damped(hessian: Tensor, damping: float) -> Tensor:
    wide = hessian.double()
    return wide + damping * wide.diagonal().mean() * torch.eye(len(wide), dtype=torch.float64)


def objective(weight: Tensor, q: Tensor, hessian: Tensor, rows: Tensor | None = None) -> float:
    gap = weight.double() - q.double()
    each = torch.einsum("ri,ij,rj->r", gap, hessian.double(), gap)
    return float(each.sum() if rows is None else each @ rows.double())


def one_table(units: int, columns: int, size: int = 1) -> TableMap:
    return TableMap(np.zeros(units, np.int64), np.zeros(columns, np.int64), size)


def uniform_tables(count: int, k: int, size: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(count, k, size, generator=generator)
    return found.sort(dim=1).values if size == 1 else found


def maps(rows: int, columns: int) -> dict[str, tuple[TableMap, int]]:
    """Name → map, entries per table."""
    by_columns = np.repeat(np.arange(4), columns // 4)
    return {
        "one table": (one_table(rows, columns), 16),
        "two entries": (one_table(rows, columns), 2),
        "64 entries": (one_table(rows, columns), 64),
        "tables of rows": (
            TableMap(np.repeat(np.arange(8), rows // 8), np.zeros(columns, np.int64), 1),
            8,
        ),
        "tables of columns": (TableMap(np.zeros(rows, np.int64), by_columns, 1), 8),
        "pairs": (one_table(rows // 2, columns, 2), 16),
        "fours of two tables": (
            TableMap(np.repeat(np.arange(2), rows // 8), np.zeros(columns, np.int64), 4),
            32,
        ),
    }


ROWS, COLUMNS = 96, 32


MAPS = maps(ROWS, COLUMNS)


def problem(name: str) -> tuple[Tensor, Tensor, Tensor, TableMap]:
    where, k = MAPS[name]
    count = int(where.rows.max() + where.columns.max()) + 1
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    return weight, second_moment(COLUMNS), uniform_tables(count, k, where.size), where
