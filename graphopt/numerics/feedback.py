"""Lookup tables fitted to a layer's outputs: error feedback and least squares over the tables.

Minimises `Σ_rows f_r (w_r − q_r)ᵀ H (w_r − q_r)` where H is the second moment of the layer's inputs
and q takes values of the tables. Codes come from column-wise error feedback (Frantar et al., GPTQ,
arXiv 2210.17323, algorithm 1; with codebooks van Baalen et al., GPTVQ, arXiv 2402.15319); for given
codes the best entries solve one linear system per table, and coordinate descent refines the codes
(Kim et al., GuidedQuant, arXiv 2505.07004, "LNQ", section 4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Unpack

from graphopt.errors import CalibrationError
from graphopt.extras import deferred
from graphopt.numerics.parallel import map_tasks
from graphopt.numerics.table_map import TableMap
from graphopt.specs.options import Options

if TYPE_CHECKING:
    from graphopt.numerics import kernels_feedback as kernels
else:
    kernels = deferred("graphopt.numerics.kernels_feedback")

__all__ = [
    "Feedback",
    "OrderedHessian",
    "TableFitKeywords",
    "TableFitOptions",
    "TableMap",
    "feedback_grouped",
    "fit_tables",
    "inverse_factor",
]

_TASK_ROWS = 64
_PRODUCTS_UP_TO = 32  # entries per table
_Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TableFitOptions(Options):
    """How codes and tables are fitted.

    Attributes:
        damping: See `inverse_factor`; of no effect for an `OrderedHessian`.
        rounds: Alternations of tables and codes; the best one is kept.
        cycles: Cycles of coordinate descent after each feedback pass.
        move_tables: False keeps the tables (for quantized ones).
    """

    damping: float = 0.01
    rounds: int = 3
    cycles: int = 1
    move_tables: bool = True


class TableFitKeywords(TypedDict, total=False):
    """The options of `TableFitOptions` as keywords of a call."""

    damping: float
    rounds: int
    cycles: int
    move_tables: bool


@dataclass(frozen=True)
class Feedback:
    """A fit.

    Attributes:
        tables: [tables, k, size] float32.
        codes: [units, columns] uint8.
        dense: The chosen values, [rows, columns] float32.
        error: The objective, relative to that of q = 0.
    """

    tables: Tensor
    codes: Tensor
    dense: Tensor
    error: float


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U with UᵀU = (H + damping · mean(diag H) · I)⁻¹, float32.

    Args:
        hessian: [columns, columns], symmetric, positive semidefinite.
        damping: Share of the mean diagonal to add; raised tenfold until the matrix is definite.
    """
    wide = hessian.double()
    if not bool(torch.isfinite(wide).all()):
        raise CalibrationError("the inputs of a layer hold NaN or Inf, or overflow when squared")
    mean = wide.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    identity = torch.eye(wide.shape[0], dtype=torch.float64, device=wide.device)
    while True:
        lower, failed = torch.linalg.cholesky_ex(wide + damping * mean * identity)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper.float().contiguous()
        damping = max(10 * damping, 1e-8)


@dataclass(frozen=True)
class OrderedHessian:
    """A Hessian as feedback uses it, made once for all fits to the same inputs.

    Attributes:
        order: Columns by decreasing diagonal.
        damped: H + damping · mean(diag H) · I in that order, float32.
        factor: See `inverse_factor`, in that order.
    """

    order: Tensor
    damped: Tensor
    factor: Tensor

    @classmethod
    def of(cls, hessian: Tensor, damping: float) -> OrderedHessian:
        """Order, damp and factor a Hessian, [columns, columns].

        Raises:
            CalibrationError: It is not finite.
        """
        h = hessian.float()
        order = torch.argsort(h.diagonal(), descending=True, stable=True)
        h = h[order][:, order].contiguous()
        mean = h.diagonal().mean()
        damped = h + damping * float(mean if mean > 0 else 1.0) * torch.eye(h.shape[0])
        return cls(order, damped, inverse_factor(h, damping))


def fit_tables(
    weight: Tensor,
    hessian: Tensor | OrderedHessian,
    tables: Tensor,
    where: TableMap,
    *,
    importance: Tensor | None = None,
    **options: Unpack[TableFitKeywords],
) -> Feedback:
    """Choose codes, and tables if wanted, for one matrix.

    Args:
        weight: [rows, columns], any float type.
        hessian: Second moment of the inputs, [columns, columns], or what was made of it before.
        tables: Tables to start from, [tables, k, size]; scalar ones increasing.
        where: Which table serves which weight.
        importance: Weight of each row's error when tables are fitted, [rows]; None is 1.
        options: The fields of `TableFitOptions`: `damping` (0.01), `rounds` (3), `cycles` (1) and
            `move_tables` (True).

    Returns:
        Codes, tables and the relative error reached.
    """
    how = TableFitOptions.of("fit_tables", options)
    if not isinstance(hessian, OrderedHessian):
        hessian = OrderedHessian.of(hessian, how.damping)
    order, h_used, factor = hessian.order, hessian.damped, hessian.factor
    w = weight.float()[:, order].T.contiguous()  # columns × rows
    ordered = replace(where, columns=where.columns[order.numpy()])
    rows_weight = torch.ones(w.shape[1]) if importance is None else importance.float()
    unit_weight = rows_weight.reshape(-1, where.size).mean(1).double()
    target = h_used @ w
    scale = float((w * target).sum(0).double() @ rows_weight.double())

    def loss(q: Tensor) -> float:
        gap = w - q
        return float((gap * (h_used @ gap)).sum(0).double() @ rows_weight.double())

    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    current = tables.float().contiguous()
    for number in range(max(how.rounds, 1)):
        q, codes = _pass(w, factor, current, ordered)
        for _ in range(how.cycles):
            if not _descend(q, codes, w, h_used, current, ordered):
                break
        reached = loss(q)
        if best is None or reached < best[0]:
            best = (reached, current, q, codes)
        elif number:
            break
        if not how.move_tables or not where.by_rows or number + 1 == how.rounds:
            break
        current = _solve(codes, target, h_used, unit_weight, where.rows, current)
    assert best is not None
    reached, current, q, codes = best
    back = torch.argsort(order)
    return Feedback(
        current, codes[back].T.contiguous(), q[back].T.contiguous(), reached / max(scale, 1e-300)
    )


def feedback_grouped(
    weight: Tensor, hessian: Tensor, tables: Tensor, where: TableMap, damping: float = 0.01
) -> Tensor:
    """Codes of a grouped convolution, whose groups have inputs of their own; tables stay.

    Args:
        weight: [groups, rows, columns].
        hessian: [groups, columns, columns].
        tables: [tables, k, size].
        where: Tables of the rows of all groups together.
        damping: See `inverse_factor`.

    Returns:
        [groups · rows / size, columns] uint8.
    """
    groups, rows, columns = weight.shape
    units = rows // where.size
    codes = torch.empty((groups * units, columns), dtype=torch.uint8)
    entries = tables.float().contiguous().numpy()

    def run(group: int) -> None:
        mine = slice(group * units, (group + 1) * units)
        part = np.array(weight[group].float().T.numpy(), order="C")  # the kernel works in place
        chosen = np.empty((columns, units), dtype=np.uint8)
        factor = inverse_factor(hessian[group], damping).numpy()
        kernels.feedback(part, factor, entries, where.rows[mine], where.columns, chosen)
        codes[mine] = torch.from_numpy(chosen.T.copy())

    for _ in map_tasks(run, range(groups)):
        pass
    return codes


def _tasks(rows: int, size: int) -> list[tuple[slice, slice]]:
    step = max(_TASK_ROWS // size, 1)
    return [
        (slice(u * size, min((u + step) * size, rows)), slice(u, min(u + step, rows // size)))
        for u in range(0, rows // size, step)
    ]


def _pass(
    w: Tensor,
    factor: Tensor,
    tables: Tensor,
    where: TableMap,
) -> tuple[Tensor, Tensor]:
    q = torch.empty_like(w)
    codes = torch.empty((w.shape[0], w.shape[1] // where.size), dtype=torch.uint8)

    def run(task: tuple[slice, slice]) -> None:
        rows, units = task
        part = np.array(w[:, rows].numpy(), order="C")  # the kernel works in place
        chosen = np.empty((part.shape[0], part.shape[1] // where.size), dtype=np.uint8)
        kernels.feedback(
            part, factor.numpy(), tables.numpy(), where.rows[units], where.columns, chosen
        )
        q[:, rows] = torch.from_numpy(part)
        codes[:, units] = torch.from_numpy(chosen)

    for _ in map_tasks(run, _tasks(w.shape[1], where.size)):
        pass
    return q, codes


def _descend(
    q: Tensor,
    codes: Tensor,
    w: Tensor,
    hessian: Tensor,
    tables: Tensor,
    where: TableMap,
) -> int:
    slope = hessian @ (w - q)

    def run(task: tuple[slice, slice]) -> int:
        rows, units = task
        part = np.ascontiguousarray(q[:, rows].numpy())
        gradient = np.ascontiguousarray(slope[:, rows].numpy())
        chosen = np.ascontiguousarray(codes[:, units].numpy())
        changes = kernels.descend(
            part,
            gradient,
            hessian.numpy(),
            tables.numpy(),
            where.rows[units],
            where.columns,
            chosen,
        )
        q[:, rows] = torch.from_numpy(part)
        codes[:, units] = torch.from_numpy(chosen)
        return int(changes)

    return sum(map_tasks(run, _tasks(w.shape[1], where.size)))


def _solve(
    codes: Tensor,
    target: Tensor,
    hessian: Tensor,
    weight: Tensor,
    row_table: _Indices,
    tables: Tensor,
) -> Tensor:
    """Entries that minimise the objective for given codes; scalar tables stay increasing."""
    accumulate = _by_products if tables.shape[1] <= _PRODUCTS_UP_TO else _by_scatter
    left, right = accumulate(codes, target, hessian, weight, row_table, tables)
    diagonal = left.diagonal(dim1=1, dim2=2)
    # an unused entry keeps its value
    ridge = 1e-6 * diagonal.amax(1, keepdim=True).clamp_min(1e-30)
    left = left + torch.diag_embed(ridge.expand_as(diagonal))
    solved = torch.linalg.solve(left, right + ridge[..., None] * tables.double()).float()
    if tables.shape[2] == 1:
        solved = solved.sort(dim=1).values
    return solved.contiguous()


def _by_products(
    codes: Tensor,
    target: Tensor,
    hessian: Tensor,
    weight: Tensor,
    row_table: _Indices,
    tables: Tensor,
) -> tuple[Tensor, Tensor]:
    """Normal equations from products with one-hot codes: the fastest way for small tables."""
    (count, k, size), (columns, units) = tables.shape, codes.shape
    left = torch.zeros(count, k, k, dtype=torch.float64)
    right = torch.zeros(count, k, size, dtype=torch.float64)
    step = max(1, 2048 // k)
    for start in range(0, units, step):
        part = slice(start, min(start + step, units))
        own = torch.from_numpy(row_table[part])
        width = len(own)
        hot = torch.zeros(columns, width, k)
        hot.scatter_(2, codes[:, part, None].long(), 1.0)
        moved = (hessian @ hot.reshape(columns, -1)).reshape(columns, width, k)
        wanted = target[:, start * size : part.stop * size].reshape(columns, width, size)
        hot = hot.permute(1, 2, 0)
        factor = weight[part, None, None]
        left.index_add_(0, own, torch.bmm(hot, moved.transpose(0, 1)).double() * factor)
        right.index_add_(0, own, torch.bmm(hot, wanted.transpose(0, 1)).double() * factor)
    return left, right


def _by_scatter(
    codes: Tensor,
    target: Tensor,
    hessian: Tensor,
    weight: Tensor,
    row_table: _Indices,
    tables: Tensor,
) -> tuple[Tensor, Tensor]:
    count, k, size = tables.shape

    def run(task: tuple[slice, slice]) -> tuple[Tensor, Tensor, int]:
        rows, units = task
        own = row_table[units]
        low, high = int(own.min()), int(own.max()) + 1
        left, right = np.zeros((high - low, k, k)), np.zeros((high - low, k, size))
        kernels.normal_equations(
            np.ascontiguousarray(codes[:, units].numpy()),
            np.ascontiguousarray(target[:, rows].numpy()),
            hessian.numpy(),
            weight[units].numpy(),
            own - low,
            left,
            right,
        )
        return torch.from_numpy(left), torch.from_numpy(right), low

    left = torch.zeros(count, k, k, dtype=torch.float64)
    right = torch.zeros(count, k, size, dtype=torch.float64)
    for part_left, part_right, low in map_tasks(run, _tasks(target.shape[1], size)):
        left[low : low + len(part_left)] += part_left
        right[low : low + len(part_left)] += part_right
    return left, right
