"""The entries of tables that fit a layer's outputs best, for given codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphopt.extras import deferred
from graphopt.numerics.device import chosen_device
from graphopt.numerics.parallel import map_tasks

if TYPE_CHECKING:
    from graphopt.numerics import kernels_feedback as kernels
else:
    kernels = deferred("graphopt.numerics.kernels_feedback")

__all__ = ["TableFit", "best_tables", "row_tasks"]

_TASK_ROWS = 64
_PRODUCTS_UP_TO = 32  # entries per table
_EXACT_UP_TO = 1 << 36  # multiplications; beyond, the equations cost more than a few gradients
_STEPS = 1
_SETTLED = 1e-8  # share of the first gradient, squared
_Indices = npt.NDArray[np.int64]


def row_tasks(rows: int, size: int) -> list[tuple[slice, slice]]:
    """Slices of a few dozen rows, and of their units of `size` rows."""
    step = max(_TASK_ROWS // size, 1)
    return [
        (slice(u * size, min((u + step) * size, rows)), slice(u, min(u + step, rows // size)))
        for u in range(0, rows // size, step)
    ]


@dataclass(frozen=True)
class TableFit:
    """Which entries of which tables stand for a matrix, and the error that they leave.

    Attributes:
        codes: [columns, units] uint8.
        slope: H (w − q), [columns, rows] float32.
        hessian: H, [columns, columns] float32, positive definite.
        weight: Importance f of each unit, float64.
        row_table: Table of each unit.
        tables: What to improve, [tables, k, size] float32.
    """

    codes: Tensor
    slope: Tensor
    hessian: Tensor
    weight: Tensor
    row_table: _Indices
    tables: Tensor

    @property
    def multiplications(self) -> int:
        """What the normal equations of all units cost."""
        columns, units = self.codes.shape
        return columns * columns * units * self.tables.shape[1]


def best_tables(fit: TableFit) -> Tensor:
    """Entries that minimise `Σ_units f_u (w_u − q_u)ᵀ H (w_u − q_u)` for given codes.

    Returns:
        Tables of the same shape; scalar ones are increasing.
    """
    solved = (_by_gradients if fit.multiplications > _EXACT_UP_TO else _by_equations)(fit)
    if fit.tables.shape[2] == 1:
        solved = solved.sort(dim=1).values
    return solved.contiguous()


def _by_gradients(fit: TableFit) -> Tensor:
    """A few steps of conjugate gradients, each a product with H: equations of all rows cost k of them."""
    (count, k, size), (columns, units) = fit.tables.shape, fit.codes.shape
    own, hessian = torch.from_numpy(fit.row_table).to(fit.hessian.device), fit.hessian
    place = fit.codes.long()

    def spread(entries: Tensor) -> Tensor:
        """Values of all weights, [columns, rows]."""
        per_unit = entries.float()[own]
        values = [per_unit[..., part].T.gather(0, place) for part in range(size)]
        return torch.stack(values, dim=2).reshape(columns, units * size)

    def gathered(values: Tensor) -> Tensor:
        """Sums of what an entry serves, [tables, k, size] float64."""
        split = values.reshape(columns, units, size)
        sums = torch.stack(
            [
                hessian.new_zeros(k, units).scatter_add_(0, place, split[..., part])
                for part in range(size)
            ],
            dim=2,
        )
        scaled = sums.transpose(0, 1).double() * fit.weight[:, None, None]
        return scaled.new_zeros(count, k, size).index_add_(0, own, scaled)

    diagonal = gathered(hessian.diagonal()[:, None].expand(columns, units * size).contiguous())
    scale = diagonal.amax(1, keepdim=True).clamp_min(1e-30)
    entries, rest = fit.tables.double(), gathered(fit.slope)
    first = rest.square().sum(1, keepdim=True)
    turned = rest / torch.maximum(diagonal, 1e-6 * scale)
    step, product = turned, (rest * turned).sum(1, keepdim=True)
    for _ in range(_STEPS):
        moved = gathered(hessian @ spread(step))
        bent = (step * moved).sum(1, keepdim=True)
        length = torch.where(bent > 0, product / bent, 0.0)
        entries = entries + length * step
        rest = rest - length * moved
        if bool((rest.square().sum(1, keepdim=True) <= _SETTLED * first).all()):
            break
        turned = rest / torch.maximum(diagonal, 1e-6 * scale)
        after = (rest * turned).sum(1, keepdim=True)
        step = turned + torch.where(product > 0, after / product, 0.0) * step
        product = after
    return entries.float()


def _by_equations(fit: TableFit) -> Tensor:
    small = fit.tables.shape[1] <= _PRODUCTS_UP_TO or chosen_device() is not None
    accumulate = _by_products if small else _by_scatter
    left, right = accumulate(fit)
    diagonal = left.diagonal(dim1=1, dim2=2)
    # an unused entry keeps its value
    ridge = 1e-6 * diagonal.amax(1, keepdim=True).clamp_min(1e-30)
    left = left + torch.diag_embed(ridge.expand_as(diagonal))
    return (fit.tables.double() + torch.linalg.solve(left, right)).float()


def _by_products(fit: TableFit) -> tuple[Tensor, Tensor]:
    """Normal equations from products with one-hot codes: the fastest way for small tables."""
    (count, k, size), (columns, units) = fit.tables.shape, fit.codes.shape
    left, right = (fit.weight.new_zeros(count, k, part) for part in (k, size))
    step = max(1, 2048 // k)
    for start in range(0, units, step):
        part = slice(start, min(start + step, units))
        own = torch.from_numpy(fit.row_table[part]).to(left.device)
        width = len(own)
        hot = fit.hessian.new_zeros(columns, width, k)
        hot.scatter_(2, fit.codes[:, part, None].long(), 1.0)
        moved = (fit.hessian @ hot.reshape(columns, -1)).reshape(columns, width, k)
        wanted = fit.slope[:, start * size : part.stop * size].reshape(columns, width, size)
        hot = hot.permute(1, 2, 0)
        factor = fit.weight[part, None, None]
        left.index_add_(0, own, torch.bmm(hot, moved.transpose(0, 1)).double() * factor)
        right.index_add_(0, own, torch.bmm(hot, wanted.transpose(0, 1)).double() * factor)
    return left, right


def _by_scatter(fit: TableFit) -> tuple[Tensor, Tensor]:
    count, k, size = fit.tables.shape

    def run(task: tuple[slice, slice]) -> tuple[Tensor, Tensor, int]:
        rows, units = task
        own = fit.row_table[units]
        low, high = int(own.min()), int(own.max()) + 1
        left, right = np.zeros((high - low, k, k)), np.zeros((high - low, k, size))
        kernels.normal_equations(
            np.ascontiguousarray(fit.codes[:, units].numpy()),
            np.ascontiguousarray(fit.slope[:, rows].numpy()),
            fit.hessian.numpy(),
            fit.weight[units].numpy(),
            own - low,
            left,
            right,
        )
        return torch.from_numpy(left), torch.from_numpy(right), low

    left = torch.zeros(count, k, k, dtype=torch.float64)
    right = torch.zeros(count, k, size, dtype=torch.float64)
    for part_left, part_right, low in map_tasks(run, row_tasks(fit.slope.shape[1], size)):
        left[low : low + len(part_left)] += part_left
        right[low : low + len(part_left)] += part_right
    return left, right
