"""Error feedback and coordinate descent (`graphopt.numerics.feedback`) on a torch device.

What the compiled kernels do a few dozen rows at a time is done here for all rows of a column at once, so the
work of a step is one gather and one product; columns follow each other as they must.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphopt.numerics.device import for_doubles
from graphopt.numerics.table_map import TableMap
from graphopt.numerics.table_solve import TableFit, best_tables

__all__ = ["DeviceSteps"]

_BLOCK_COLUMNS = 128


class _Entries:
    """Tables as columns look up in them."""

    def __init__(self, tables: Tensor, where: TableMap) -> None:
        self.rows = torch.from_numpy(where.rows).to(tables.device)
        self.columns = where.columns.tolist()
        self.tables, self.size = tables, where.size
        self._known: tuple[int, Tensor, Tensor] | None = None

    def _of(self, column: int) -> tuple[Tensor, Tensor]:
        """Entries of each unit, [units, k, size], and what decides between them."""
        offset = self.columns[column]
        if self._known is None or self._known[0] != offset:
            entries = self.tables[self.rows + offset]
            if self.size == 1:
                level = 0.5 * (entries[:, :-1, 0] + entries[:, 1:, 0]).contiguous()
            else:
                level = 0.5 * entries.square().sum(2)
            self._known = offset, entries, level
        return self._known[1:]

    def nearest(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Codes [units] and entries [rows] nearest to the values [rows] of a column."""
        entries, level = self._of(column)
        units = values.reshape(-1, self.size)
        if self.size == 1:
            codes = torch.searchsorted(level, units.contiguous())[:, 0]
        else:
            codes = (level - torch.einsum("uks,us->uk", entries, units)).argmin(1)
        chosen = entries.gather(1, codes[:, None, None].expand(-1, 1, self.size))
        return codes, chosen.reshape(-1)


def _blocks(columns: int) -> list[slice]:
    starts = range(0, columns, _BLOCK_COLUMNS)
    return [slice(start, min(start + _BLOCK_COLUMNS, columns)) for start in starts]


@dataclass(frozen=True)
class DeviceSteps:
    """The steps of `fitted_in_rounds`, with everything on the device of the matrix.

    Attributes:
        w: What is wanted, [columns, rows] float32.
        hessian: Damped, [columns, columns] float32.
        factor: Of `feedback_factor`.
        where: Which table serves which weight.
        unit_weight: Importance of each unit, float64, on the CPU.
    """

    w: Tensor
    hessian: Tensor
    factor: Tensor
    where: TableMap
    unit_weight: Tensor

    def choose(self, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Values and codes by error feedback."""
        columns, rows = self.w.shape
        entries, q, factor = _Entries(tables, self.where), self.w.clone(), self.factor
        codes = torch.empty(columns, rows // self.where.size, dtype=torch.uint8, device=q.device)
        for block in _blocks(columns):
            errors = torch.empty(block.stop - block.start, rows, device=q.device)
            for column in range(block.start, block.stop):
                own, chosen = entries.nearest(q[column], column)
                error = self.w[column] - chosen
                codes[column], q[column] = own.to(torch.uint8), chosen
                errors[column - block.start] = error
                later = slice(column + 1, block.stop)
                q[later].addr_(factor[column, later], error, alpha=-1)
            q[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
        return q, codes

    def descend(self, q: Tensor, codes: Tensor, slope: Tensor, tables: Tensor) -> int:
        """One cycle of coordinate descent; the first three move."""
        columns, rows = q.shape
        entries, hessian = _Entries(tables, self.where), self.hessian
        before = codes.clone()
        for block in _blocks(columns):
            moves = torch.empty(block.stop - block.start, rows, device=q.device)
            for column in range(block.start, block.stop):
                wanted = q[column] + slope[column] / hessian[column, column]
                own, chosen = entries.nearest(wanted, column)
                moves[column - block.start] = move = chosen - q[column]
                codes[column], q[column] = own.to(torch.uint8), chosen
                slope[block].addr_(hessian[block, column], move, alpha=-1)
            for others in (slice(0, block.start), slice(block.stop, columns)):
                slope[others].addmm_(hessian[others, block], moves, alpha=-1)
        return int((codes != before).sum())

    def improve(self, codes: Tensor, slope: Tensor, tables: Tensor) -> Tensor:
        """The entries that fit best for given codes."""
        home = for_doubles(self.w.device)
        fit = TableFit(
            codes.to(home),
            slope.to(home),
            self.hessian.to(home),
            self.unit_weight.to(home),
            np.asarray(self.where.rows),
            tables.to(home),
        )
        return best_tables(fit).to(self.w.device)
