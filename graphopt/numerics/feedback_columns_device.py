"""Error feedback and coordinate descent of `graphopt.numerics.feedback_columns` on a torch device.

Units follow each other as they must; all rows of one choose their entries at once, by one product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ColumnSteps"]

_Slices = list[tuple[slice, slice]]


@dataclass(frozen=True)
class ColumnSteps:
    """The steps of `fitted_in_rounds`, with everything on the device of the matrix.

    Attributes:
        w: What is wanted, [columns, rows] float32, in the order in which its units are coded.
        hessian: Damped, [columns, columns] float32.
        factor: Of `feedback_factor`.
        own: Each unit's block of the Hessian's own factor, [units, d, d].
        lower: L with LLᵀ the unit's block of the Hessian.
        upper: L⁻ᵀ.
        rows: Table of each row.
        offsets: Offset that each unit adds.
        slices: Blocks of columns and of their units.
    """

    w: Tensor
    hessian: Tensor
    factor: Tensor
    own: Tensor
    lower: Tensor
    upper: Tensor
    rows: Tensor
    offsets: list[int]
    slices: _Slices

    def _nearest(
        self, y: Tensor, tables: Tensor, metric: Tensor, unit: int
    ) -> tuple[Tensor, Tensor]:
        """Codes [rows] of the entries that, turned by `metric`, are nearest to y [d, rows]; the entries."""
        own = tables[self.rows + self.offsets[unit]] if len(tables) > 1 else tables
        turned = own @ metric
        level = 0.5 * turned.square().sum(2)
        # the least |e|² / 2 − y·e
        codes = (level - (turned @ y.T[..., None])[..., 0]).argmin(1)
        if len(own) == 1:
            return codes, own[0, codes].T
        return codes, own[torch.arange(len(codes), device=codes.device), codes].T

    def choose(self, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Values and codes by error feedback."""
        (columns, rows), size = self.w.shape, self.own.shape[1]
        q, factor = self.w.clone(), self.factor
        codes = torch.empty(columns // size, rows, dtype=torch.uint8, device=q.device)
        for block, units in self.slices:
            for unit in range(units.start, units.stop):
                mine = slice(unit * size, (unit + 1) * size)
                later = slice(mine.stop, block.stop)
                y = self.own[unit].T @ q[mine]
                chosen, q[mine] = self._nearest(y, tables, self.own[unit], unit)
                codes[unit] = chosen.to(torch.uint8)
                q[later].addmm_(factor[mine, later].T, self.w[mine] - q[mine], alpha=-1)
            rest = slice(block.stop, columns)
            q[rest].addmm_(factor[block, rest].T, self.w[block] - q[block], alpha=-1)
        return q, codes

    def descend(self, q: Tensor, codes: Tensor, slope: Tensor, tables: Tensor) -> int:
        """One cycle of coordinate descent; the first three move."""
        columns, size, hessian = len(q), self.own.shape[1], self.hessian
        before = codes.clone()
        for block, units in self.slices:
            old = q[block].clone()
            for unit in range(units.start, units.stop):
                mine = slice(unit * size, (unit + 1) * size)
                y = self.lower[unit].T @ q[mine] + self.upper[unit].T @ slope[mine]
                chosen, entries = self._nearest(y, tables, self.lower[unit], unit)
                codes[unit] = chosen.to(torch.uint8)
                move, q[mine] = entries - q[mine], entries
                slope[block].addmm_(hessian[block, mine], move, alpha=-1)
            moves = q[block] - old
            for others in (slice(0, block.start), slice(block.stop, columns)):
                slope[others].addmm_(hessian[others, block], moves, alpha=-1)
        return int((codes != before).sum())
