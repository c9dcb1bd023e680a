"""Lookup tables fitted to a layer's outputs: error feedback and least squares over the tables.

Minimises `Σ_rows f_r (w_r − q_r)ᵀ H (w_r − q_r)` where H is the second moment of the layer's inputs
and q takes values of the tables. Codes come from column-wise error feedback (Frantar et al., GPTQ,
arXiv 2210.17323, algorithm 1; with codebooks van Baalen et al., GPTVQ, arXiv 2402.15319); for given
codes the best entries solve one linear system per table, and coordinate descent refines the codes
(Kim et al., GuidedQuant, arXiv 2505.07004, "LNQ", section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Unpack

from graphopt.errors import CalibrationError
from graphopt.extras import deferred
from graphopt.numerics.device import chosen_device, for_doubles
from graphopt.numerics.feedback_device import DeviceSteps
from graphopt.numerics.finite import all_finite
from graphopt.numerics.parallel import map_tasks
from graphopt.numerics.table_map import TableMap
from graphopt.numerics.table_solve import TableFit, best_tables, row_tasks
from graphopt.specs.options import Options

if TYPE_CHECKING:
    from graphopt.numerics import kernels_feedback as kernels
else:
    kernels = deferred("graphopt.numerics.kernels_feedback")

__all__ = [
    "Feedback",
    "FitSteps",
    "OrderedHessian",
    "TableFitKeywords",
    "TableFitOptions",
    "TableMap",
    "diagonal_blocks",
    "feedback_factor",
    "feedback_grouped",
    "fit_tables",
    "fitted_in_rounds",
]

_BLOCK_COLUMNS = 128
_Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TableFitOptions(Options):
    """How codes and tables are fitted.

    Attributes:
        damping: See `feedback_factor`; of no effect for an `OrderedHessian`.
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


def feedback_factor(hessian: Tensor, damping: float, size: int = 1) -> tuple[Tensor, Tensor]:
    """What columns hand on of their errors, so that later ones make up for them.

    With `H + damping · mean(diag H) · I = R Rᵀ`, R upper triangular, errors e cost `‖e R‖²`, in whose part j
    stand the errors up to column j alone: a column aims at its weight and `Σ e_k R_kj / R_jj` over those
    before it. That is GPTQ's feedback (arXiv 2210.17323, algorithm 1) without the inverse of H, and Babai's
    nearest plane (Chen et al., "The geometry of LLM quantization", arXiv 2507.18553).

    Args:
        hessian: [columns, columns], symmetric, positive semidefinite.
        damping: Share of the mean diagonal to add; raised tenfold until the matrix is definite.
        size: Columns that are decided together; a block of R takes the place of `R_jj`.

    Returns:
        Upper −R with each block column times the inverse of its own block, so that those are −I, float32,
        and these blocks of R, [columns / size, size, size] float64.

    Raises:
        CalibrationError: It is not finite.
    """
    if not all_finite(hessian):
        raise CalibrationError("the inputs of a layer hold NaN or Inf, or overflow when squared")
    device = chosen_device()
    if device is not None:
        hessian = hessian.to(for_doubles(device))
    mean = hessian.diagonal().double().mean().clamp_min(torch.finfo(torch.float32).tiny)
    while True:
        # with columns and rows in reverse H = LLᵀ; turned back L is R
        turned = hessian.flip(0, 1).double()
        turned.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(turned)
        del turned
        if not int(failed):
            blocks = diagonal_blocks(lower, size)
            factor = _normalised(lower, blocks).neg_().flip(0, 1).cpu()
            if all_finite(factor):
                return factor, blocks.flip(0, 1, 2).cpu()
        damping = max(10 * damping, 1e-8)


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """Blocks of a matrix along its diagonal, [columns / size, size, size], in new memory."""
    count = len(matrix) // size
    split = matrix.reshape(count, size, count, size)
    return split.diagonal(dim1=0, dim2=2).movedim(2, 0).clone(memory_format=torch.contiguous_format)


def _normalised(lower: Tensor, blocks: Tensor) -> Tensor:
    """Columns times the inverse of their own block, float32."""
    count, size, _ = blocks.shape
    if size == 1:
        return lower.div_(blocks.reshape(-1)).float()
    unit = torch.eye(size, dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(blocks, unit, upper=False)
    columns = lower.reshape(len(lower), count, size).transpose(0, 1)
    return (columns @ inverse).transpose(0, 1).reshape(len(lower), -1).float()


@dataclass(frozen=True)
class OrderedHessian:
    """A Hessian as feedback uses it, made once for all fits to the same inputs.

    Attributes:
        order: Columns by decreasing diagonal.
        damped: H + damping · mean(diag H) · I in that order, float32.
        factor: See `feedback_factor`, in that order.
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
        factor, _ = feedback_factor(h, damping)
        h.diagonal().add_(damping * float(mean if mean > 0 else 1.0))
        return cls(order, h, factor)


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

    def choose(now: Tensor) -> tuple[Tensor, Tensor]:
        return _pass(w, factor, now, ordered)

    def descend(q: Tensor, codes: Tensor, slope: Tensor, now: Tensor) -> int:
        return _descend(q, codes, slope, h_used, now, ordered)

    def improve(codes: Tensor, slope: Tensor, now: Tensor) -> Tensor:
        return best_tables(TableFit(codes, slope, h_used, unit_weight, where.rows, now))

    steps = FitSteps(choose, descend, improve if where.by_rows else None)
    device = chosen_device()
    if device is not None:
        w, h_used = w.to(device), h_used.to(device)
        on_device = DeviceSteps(w, h_used, factor.to(device), ordered, unit_weight)
        improving = on_device.improve if where.by_rows else None
        steps = FitSteps(on_device.choose, on_device.descend, improving)
    start = tables.float().to(w.device)
    reached, *found = fitted_in_rounds(w, h_used, rows_weight, start, how, steps)
    current, q, codes = (part.cpu() for part in found)
    back = torch.argsort(order)
    return Feedback(current, codes[back].T.contiguous(), q[back].T.contiguous(), reached)


@dataclass(frozen=True)
class FitSteps:
    """What a round of fitting does to values `q` and codes of a matrix.

    Attributes:
        choose: Tables → values and codes, by error feedback.
        descend: Values, codes, H (w − q), tables → how many codes have changed; changes the first three.
        improve: Codes, H (w − q), tables → better tables; None leaves tables as they are.
    """

    choose: Callable[[Tensor], tuple[Tensor, Tensor]]
    descend: Callable[[Tensor, Tensor, Tensor, Tensor], int]
    improve: Callable[[Tensor, Tensor, Tensor], Tensor] | None


def fitted_in_rounds(
    w: Tensor,
    hessian: Tensor,
    importance: Tensor,
    tables: Tensor,
    how: TableFitOptions,
    steps: FitSteps,
) -> tuple[float, Tensor, Tensor, Tensor]:
    """Choose codes and move tables in turn while the error falls.

    Args:
        w: What is wanted, [columns, rows] float32.
        hessian: [columns, columns].
        importance: Of each row's error, [rows].
        tables: To start from.
        how: Rounds, cycles of descent, and whether tables move.
        steps: Of a round.

    Returns:
        The best relative error, and its tables, values and codes.
    """
    rows_weight = importance.double()
    scale = float((w * (hessian @ w)).sum(0).cpu().double() @ rows_weight)
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    current = tables.float().contiguous()
    for number in range(max(how.rounds, 1)):
        q, codes = steps.choose(current)
        slope = hessian @ (w - q)
        for _ in range(how.cycles):
            if not steps.descend(q, codes, slope, current):
                break
        reached = float(((w - q) * slope).sum(0).cpu().double() @ rows_weight)
        if best is None or reached < best[0]:
            best = (reached, current, q, codes)
        elif number:
            break
        if not how.move_tables or steps.improve is None or number + 1 == how.rounds:
            break
        current = steps.improve(codes, slope, current)
    assert best is not None
    return (best[0] / max(scale, 1e-300), *best[1:])


def feedback_grouped(
    weight: Tensor, hessian: Tensor, tables: Tensor, where: TableMap, damping: float = 0.01
) -> Tensor:
    """Codes of a grouped convolution, whose groups have inputs of their own; tables stay.

    Args:
        weight: [groups, rows, columns].
        hessian: [groups, columns, columns].
        tables: [tables, k, size].
        where: Tables of the rows of all groups together.
        damping: See `feedback_factor`.

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
        factor, _ = feedback_factor(hessian[group], damping)
        turned = part.copy(), factor.numpy()
        places, errors = (where.rows[mine], where.columns), np.empty_like(part)
        axes = (0,) * where.size
        kernels.feedback(axes, part, *turned, entries, *places, chosen, errors)
        codes[mine] = torch.from_numpy(chosen.T.copy())

    for _ in map_tasks(run, range(groups)):
        pass
    return codes


def _blocks(columns: int) -> list[slice]:
    return [
        slice(start, min(start + _BLOCK_COLUMNS, columns))
        for start in range(0, columns, _BLOCK_COLUMNS)
    ]


def _pass(w: Tensor, factor: Tensor, tables: Tensor, where: TableMap) -> tuple[Tensor, Tensor]:
    """Values and codes by error feedback; what a block of columns hands on is one product."""
    columns, rows = w.shape
    q, errors = w.clone(), torch.empty(min(_BLOCK_COLUMNS, columns), rows)
    codes = torch.empty((columns, rows // where.size), dtype=torch.uint8)
    axes = (0,) * where.size
    for block in _blocks(columns):
        own = factor[block, block].contiguous().numpy()

        def run(task: tuple[slice, slice], block: slice = block, own: Any = own) -> None:
            mine, units = task
            part = np.array(q[block, mine].numpy(), order="C")  # the kernel works in place
            chosen = np.empty((len(part), part.shape[1] // where.size), dtype=np.uint8)
            left = np.empty_like(part)
            exact = np.ascontiguousarray(w[block, mine].numpy())
            places = where.rows[units], where.columns[block]
            kernels.feedback(axes, part, exact, own, tables.numpy(), *places, chosen, left)
            q[block, mine] = torch.from_numpy(part)
            codes[block, units] = torch.from_numpy(chosen)
            errors[: len(part), mine] = torch.from_numpy(left)

        for _ in map_tasks(run, row_tasks(rows, where.size)):
            pass
        q[block.stop :].addmm_(
            factor[block, block.stop :].T, errors[: block.stop - block.start], alpha=-1
        )
    return q, codes


def _descend(
    q: Tensor, codes: Tensor, slope: Tensor, hessian: Tensor, tables: Tensor, where: TableMap
) -> int:
    """One cycle of coordinate descent; `slope`, H (w − q), moves along with values and codes."""
    columns, rows = q.shape
    moves = torch.empty(min(_BLOCK_COLUMNS, columns), rows)
    axes, changes = (0,) * where.size, 0
    for block in _blocks(columns):
        own = hessian[block, block].contiguous().numpy()

        def run(task: tuple[slice, slice], block: slice = block, own: Any = own) -> int:
            mine, units = task
            part, gradient = (np.array(x[block, mine].numpy(), order="C") for x in (q, slope))
            chosen = np.array(codes[block, units].numpy(), order="C")
            moved = np.empty_like(part)
            places = where.rows[units], where.columns[block]
            entries = tables.numpy()
            changed = kernels.descend(axes, part, gradient, own, entries, *places, chosen, moved)
            q[block, mine], slope[block, mine] = map(torch.from_numpy, (part, gradient))
            codes[block, units] = torch.from_numpy(chosen)
            moves[: len(part), mine] = torch.from_numpy(moved)
            return int(changed)

        changed = sum(map_tasks(run, row_tasks(rows, where.size)))
        changes += changed
        if changed:
            made = moves[: block.stop - block.start]
            for others in (slice(0, block.start), slice(block.stop, columns)):
                slope[others].addmm_(hessian[others, block], made, alpha=-1)
    return changes
