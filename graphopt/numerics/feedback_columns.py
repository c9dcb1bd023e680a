"""Lookup tables fitted to a layer's outputs where table entries lie along columns.

The loss and the method are those of `graphopt.numerics.feedback`; an entry serves neighbouring columns
of one row, whose errors it weighs by their own block of the Hessian and hands on together (van Baalen
et al., GPTVQ, arXiv 2402.15319, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Unpack

from graphopt.extras import deferred
from graphopt.numerics.device import chosen_device, for_doubles
from graphopt.numerics.feedback import (
    Feedback,
    FitSteps,
    TableFitKeywords,
    TableFitOptions,
    diagonal_blocks,
    feedback_factor,
    fitted_in_rounds,
)
from graphopt.numerics.feedback_columns_device import ColumnSteps
from graphopt.numerics.parallel import map_tasks
from graphopt.numerics.table_map import TableMap
from graphopt.numerics.table_solve import row_tasks

if TYPE_CHECKING:
    from graphopt.numerics import kernels_columns as kernels
else:
    kernels = deferred("graphopt.numerics.kernels_columns")

__all__ = ["ColumnMap", "fit_column_tables"]

_BLOCK_COLUMNS = 128
_STEPS = 2  # gradient steps of tables in a round
_Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ColumnMap:
    """Which columns share a code, and which table serves it.

    Attributes:
        columns: Columns of each unit in the order of an entry's values, [units, d] int64.
        rows: Table of each row, int64.
        offsets: Offset that each unit adds, int64.
    """

    columns: Tensor
    rows: _Indices
    offsets: _Indices

    @classmethod
    def of(cls, numbers: Tensor, per_table: int, size: int) -> ColumnMap | None:
        """The map of a matrix; None where entries do not lie along columns, alike in all rows.

        Args:
            numbers: Number of the vector of each element, [rows, columns] int64.
            per_table: Vectors of a table.
            size: Length of an entry.
        """
        order = torch.argsort(numbers[0], stable=True)
        if len(order) % size:
            return None
        units = numbers[:, order].reshape(len(numbers), -1, size)
        if bool((units != units[:, :, :1]).any()):
            return None
        where = TableMap.of(units[:, :, 0] // per_table)
        if where is None:
            return None
        return cls(order.reshape(-1, size), where.rows, where.columns)


@dataclass(frozen=True)
class _Problem:
    """A matrix in the order in which its units are coded, with blocks of its Hessian turned.

    Attributes:
        units: The units in that order.
        order: Their columns.
        hessian: Damped, [columns, columns] float32.
        factor: See `feedback_factor`.
        own: Each unit's block of the Hessian's own factor, [units, d, d].
        lower: L with LLᵀ the unit's block of the Hessian.
        upper: L⁻ᵀ.
        rows: Table of each row.
        offsets: Offset that each unit adds.
    """

    units: Tensor
    order: Tensor
    hessian: Tensor
    factor: Tensor
    own: Tensor
    lower: Tensor
    upper: Tensor
    rows: _Indices
    offsets: _Indices

    @classmethod
    def of(cls, hessian: Tensor, damping: float, where: ColumnMap) -> _Problem:
        level = hessian.float().diagonal()[where.columns].sum(1)
        units = torch.argsort(level, descending=True, stable=True)
        order = where.columns[units].reshape(-1)
        h = hessian.float()[order][:, order].contiguous()
        mean, size = float(h.diagonal().mean()), where.columns.shape[1]
        factor, own = feedback_factor(h, damping, size)
        h.diagonal().add_(damping * (mean if mean > 0 else 1.0))
        identity = torch.eye(size, dtype=torch.float64)
        lower = torch.linalg.cholesky(diagonal_blocks(h, size).double())
        upper = torch.linalg.solve_triangular(lower, identity, upper=False).mT
        own, lower, upper = (each.float().contiguous() for each in (own, lower, upper))
        offsets = where.offsets[units.numpy()]
        return cls(units, order, h, factor, own, lower, upper, where.rows, offsets)

    @property
    def size(self) -> int:
        """Length of an entry."""
        return self.own.shape[1]

    def slices(self) -> list[tuple[slice, slice]]:
        """Blocks of columns and of their units."""
        size, count = self.size, len(self.own)
        step = max(_BLOCK_COLUMNS // size, 1)
        units = [slice(start, min(start + step, count)) for start in range(0, count, step)]
        return [(slice(part.start * size, part.stop * size), part) for part in units]


def fit_column_tables(
    weight: Tensor,
    hessian: Tensor,
    tables: Tensor,
    where: ColumnMap,
    *,
    importance: Tensor | None = None,
    **options: Unpack[TableFitKeywords],
) -> Feedback:
    """Choose codes, and tables if wanted, for one matrix.

    Args:
        weight: [rows, columns], any float type.
        hessian: Second moment of the inputs, [columns, columns].
        tables: Tables to start from, [tables, k, d].
        where: Which table serves which weight.
        importance: Weight of each row's error when tables are fitted, [rows]; None is 1.
        options: The fields of `TableFitOptions`.

    Returns:
        Codes [rows, units], tables and the relative error reached.
    """
    how = TableFitOptions.of("fit_column_tables", options)
    problem = _Problem.of(hessian, how.damping, where)
    w = weight.float()[:, problem.order].T.contiguous()  # columns × rows
    rows_weight = torch.ones(w.shape[1]) if importance is None else importance.float()

    def improve(codes: Tensor, slope: Tensor, now: Tensor) -> Tensor:
        return _better_tables(codes, slope, now, problem, rows_weight)

    steps = FitSteps(
        lambda now: _pass(w, now, problem),
        lambda q, codes, slope, now: _descend(q, codes, slope, now, problem),
        improve,
    )
    hessian, device = problem.hessian, chosen_device()
    if device is not None:
        w, hessian = w.to(device), hessian.to(device)
        there = _on_device(problem, w, hessian)
        steps = FitSteps(there.choose, there.descend, improve)
    reached, *found = fitted_in_rounds(w, hessian, rows_weight, tables.to(w.device), how, steps)
    current, q, codes = (part.cpu() for part in found)
    return Feedback(
        current,
        codes[torch.argsort(problem.units)].T.contiguous(),
        q[torch.argsort(problem.order)].T.contiguous(),
        reached,
    )


def _on_device(problem: _Problem, w: Tensor, hessian: Tensor) -> ColumnSteps:
    turned = (problem.factor, problem.own, problem.lower, problem.upper)
    factor, own, lower, upper = (each.to(w.device) for each in turned)
    rows = torch.from_numpy(problem.rows).to(w.device)
    places = (rows, problem.offsets.tolist(), problem.slices())
    return ColumnSteps(w, hessian, factor, own, lower, upper, *places)


def _row_slices(rows: int) -> list[slice]:
    return [mine for mine, _ in row_tasks(rows, 1)]


def _pass(w: Tensor, tables: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
    """Values and codes by error feedback; what a block of columns hands on is one product."""
    columns, rows = w.shape
    q, errors = w.clone(), torch.empty(min(_BLOCK_COLUMNS, columns), rows)
    codes = torch.empty((columns // problem.size, rows), dtype=torch.uint8)
    axes, entries = (0,) * problem.size, tables.numpy()
    for block, units in problem.slices():
        hands = problem.factor[block, block].contiguous().numpy()
        own = problem.own[units].numpy()

        def run(
            mine: slice, block: slice = block, units: slice = units, turned: Any = (hands, own)
        ) -> None:
            part = np.array(q[block, mine].numpy(), order="C")  # the kernel works in place
            chosen = np.empty((units.stop - units.start, part.shape[1]), dtype=np.uint8)
            left = np.empty_like(part)
            exact = np.ascontiguousarray(w[block, mine].numpy())
            places = problem.rows[mine], problem.offsets[units]
            kernels.feedback(axes, part, exact, *turned, entries, *places, chosen, left)
            q[block, mine] = torch.from_numpy(part)
            codes[units, mine] = torch.from_numpy(chosen)
            errors[: len(part), mine] = torch.from_numpy(left)

        for _ in map_tasks(run, _row_slices(rows)):
            pass
        q[block.stop :].addmm_(
            problem.factor[block, block.stop :].T, errors[: block.stop - block.start], alpha=-1
        )
    return q, codes


def _descend(q: Tensor, codes: Tensor, slope: Tensor, tables: Tensor, problem: _Problem) -> int:
    """One cycle of coordinate descent; `slope`, H (w − q), moves along with values and codes."""
    columns, rows = q.shape
    moves = torch.empty(min(_BLOCK_COLUMNS, columns), rows)
    axes, entries, changes = (0,) * problem.size, tables.numpy(), 0
    for block, units in problem.slices():
        own = problem.hessian[block, block].contiguous().numpy()

        def run(mine: slice, block: slice = block, units: slice = units, own: Any = own) -> int:
            part, gradient = (np.array(x[block, mine].numpy(), order="C") for x in (q, slope))
            chosen = np.array(codes[units, mine].numpy(), order="C")
            moved = np.empty_like(part)
            turned = problem.lower[units].numpy(), problem.upper[units].numpy()
            places = problem.rows[mine], problem.offsets[units]
            changed = kernels.descend(
                axes, part, gradient, own, *turned, entries, *places, chosen, moved
            )
            q[block, mine], slope[block, mine] = map(torch.from_numpy, (part, gradient))
            codes[units, mine] = torch.from_numpy(chosen)
            moves[: len(part), mine] = torch.from_numpy(moved)
            return int(changed)

        changed = sum(map_tasks(run, _row_slices(rows)))
        changes += changed
        if changed:
            made = moves[: block.stop - block.start]
            for others in (slice(0, block.start), slice(block.stop, columns)):
                slope[others].addmm_(problem.hessian[others, block], made, alpha=-1)
    return changes


def _better_tables(
    codes: Tensor, slope: Tensor, tables: Tensor, problem: _Problem, weight: Tensor
) -> Tensor:
    """Entries after a few steps of conjugate gradients on the loss for given codes."""
    (count, k, size), (units, rows) = tables.shape, codes.shape
    place, home = tables.device, for_doubles(tables.device)
    codes, slope, tables, weight = (each.to(home) for each in (codes, slope, tables, weight))
    hessian = problem.hessian.to(home)
    own = torch.from_numpy(problem.offsets)[:, None] + torch.from_numpy(problem.rows)[None]
    taken = (own.to(home) * k + codes.long()).reshape(-1)

    def spread(entries: Tensor) -> Tensor:
        """Values of all weights, [columns, rows]."""
        values = entries.reshape(-1, size)[taken].reshape(units, rows, size)
        return values.transpose(1, 2).reshape(units * size, rows)

    def gathered(values: Tensor) -> Tensor:
        """Sums of what an entry serves, [tables, k, d]."""
        split = (values * weight).reshape(units, size, rows).transpose(1, 2).reshape(-1, size)
        sums = torch.zeros(count * k, size, dtype=torch.float64, device=home)
        return sums.index_add_(0, taken, split.double()).reshape(count, k, size)

    level = hessian.diagonal()[:, None].expand(units * size, rows)
    diagonal = gathered(level).clamp_min(1e-30)
    entries, rest = tables.double(), gathered(slope)
    turned = rest / diagonal
    step, product = turned, (rest * turned).sum()
    for _ in range(_STEPS):
        moved = gathered(hessian @ spread(step.float()))
        bent = (step * moved).sum()
        if not float(bent) > 0:
            break
        length = product / bent
        entries, rest = entries + length * step, rest - length * moved
        turned = rest / diagonal
        after = (rest * turned).sum()
        step, product = turned + after / product * step, after
    return entries.float().to(place)
