"""Palettization against a layer's outputs: codes by error feedback, tables by least squares."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphopt.analysis.matrix_form import MatrixUse
from graphopt.fitting.importance import element_importance
from graphopt.fitting.output_loss import OutputLoss, row_losses
from graphopt.numerics.feedback import Feedback, TableMap, feedback_grouped, fit_tables
from graphopt.numerics.feedback_columns import ColumnMap, fit_column_tables
from graphopt.schemes.palettize import PalettizedWeight, arrange, assemble, palettize
from graphopt.schemes.tables import StoredTables, round_tables
from graphopt.specs import PalettizationSpec

__all__ = ["NO_ORDER", "palettize_by_columns", "palettize_to_outputs"]

_CYCLES_OF_VECTORS = 4  # of coordinate descent
NO_ORDER = "its tables do not follow the rows and columns of its matrix"


def palettize_to_outputs(
    weight: Tensor,
    spec: PalettizationSpec,
    loss: OutputLoss,
    *,
    output_axis: int = 0,
    rounds: int = 3,
    seed: int = 0,
) -> PalettizedWeight | None:
    """Palettize one weight so that the loss at its op's outputs is small.

    Args:
        weight: The stored tensor.
        spec: What it becomes.
        loss: What its errors cost.
        output_axis: Output-channel axis of the stored tensor.
        rounds: Alternations of codes and tables.
        seed: Seed of vector tables.

    Returns:
        The stored form; None where tables or entries do not follow rows or columns of the matrix,
        so that there is nothing to feed an error on to.
    """
    use, hessian = loss.use, loss.hessian
    places = _places(weight, spec, use, output_axis)
    if places is None:
        return None
    where, units = places
    shape = use.matrix(weight, casts=False).shape  # groups, rows, columns
    along_columns = isinstance(where, ColumnMap)
    if (along_columns and shape[0] > 1) or (not along_columns and shape[1] % spec.cluster_dim):
        return None
    rows = torch.ones(shape[:2]) if loss.row_importance is None else loss.row_importance.float()
    rows = rows / rows.mean().clamp_min(1e-30)
    start = palettize(
        weight,
        spec,
        output_axis=output_axis,
        seed=seed,
        importance=element_importance(use, weight, hessian, rows),
    )
    parts = arrange(weight, spec, output_axis, None)
    matrix = use.matrix(parts.scaled, casts=False).float()
    scaled_rows = rows
    if parts.channel_scale is not None:
        scale = use.matrix(parts.channel_scale.expand_as(weight).contiguous(), casts=False)
        scaled_rows = rows * scale[:, :, 0].float().square()

    def fitted(entries: Tensor, *, move: bool) -> tuple[Tensor, Tensor]:
        fit: Feedback
        if isinstance(where, ColumnMap):
            fit = fit_column_tables(
                matrix[0],
                hessian[0],
                entries,
                where,
                importance=scaled_rows[0],
                damping=loss.damping,
                rounds=rounds,
                cycles=_CYCLES_OF_VECTORS,
                move_tables=move,
            )
            return fit.tables.to(weight.dtype), fit.codes
        if shape[0] > 1:
            return entries, feedback_grouped(matrix, hessian, entries, where, loss.damping)
        fit = fit_tables(
            matrix[0],
            hessian[0] if loss.ordered is None else loss.ordered,
            entries,
            where,
            importance=scaled_rows[0],
            damping=loss.damping,
            rounds=rounds,
            cycles=_CYCLES_OF_VECTORS if spec.cluster_dim > 1 else 1,
            move_tables=move,
        )
        return fit.tables.to(weight.dtype), fit.codes

    tables: Tensor | StoredTables
    tables, codes = fitted(_start_tables(start, spec), move=True)
    if spec.lut_qspec is not None:
        tables = round_tables(tables, spec.lut_qspec)
        _, codes = fitted(tables.decoded, move=False)
    grouped = torch.empty(parts.vectors.shape[:2], dtype=torch.uint8)
    grouped.reshape(-1)[torch.from_numpy(units.reshape(-1))] = codes.reshape(-1)
    fed_back = assemble(weight, spec, parts, tables, grouped)
    wanted = use.matrix(weight, casts=False).float()

    def total(palettized: PalettizedWeight) -> float:
        gap = wanted - use.matrix(palettized.dense(), casts=False).float()
        return float(row_losses(gap, hessian).double().mul(rows.double()).sum())

    return fed_back if total(fed_back) <= total(start) else start


def palettize_by_columns(
    weight: Tensor,
    spec: PalettizationSpec,
    use: MatrixUse,
    hessian: Tensor,
    *,
    output_axis: int = 0,
    seed: int = 0,
) -> PalettizedWeight:
    """Palettize one weight by the diagonal of the Hessian alone, where errors cannot be fed back.

    Args:
        weight: The stored tensor.
        spec: What it becomes.
        use: The op that reads it.
        hessian: Second moment of the op's columns, [groups, columns, columns].
        output_axis: Output-channel axis of the stored tensor.
        seed: Seed of vector tables.
    """
    importance = element_importance(use, weight, hessian)
    return palettize(weight, spec, output_axis=output_axis, seed=seed, importance=importance)


def _start_tables(start: PalettizedWeight, spec: PalettizationSpec) -> Tensor:
    """Table values, [groups, k, cluster_dim]."""
    shape = (start.layout.n_groups, spec.n_entries, spec.cluster_dim)
    return start.table_values().reshape(shape)


def _places(
    weight: Tensor, spec: PalettizationSpec, use: MatrixUse, output_axis: int
) -> tuple[TableMap | ColumnMap, npt.NDArray[np.int64]] | None:
    """Tables of rows and columns, and the number of each unit in the order of the codes."""
    layout = arrange(weight, spec, output_axis, None).layout
    per_group = weight.numel() // layout.n_groups // layout.cluster_dim
    count = layout.n_groups * per_group
    numbers = torch.arange(count).reshape(layout.n_groups, per_group)
    spread = layout.join_indices(numbers)
    spread = spread.repeat_interleave(layout.cluster_dim, dim=layout.vector_axis)
    if use.matrix(spread, casts=False).numel() != weight.numel():
        return None
    matrix = use.matrix(spread, casts=False).flatten(0, 1)  # rows of all groups × columns
    length = layout.cluster_dim
    units = matrix.reshape(-1, length, matrix.shape[1]) if matrix.shape[0] % length == 0 else None
    if units is not None and not bool((units != units[:, :1]).any()):
        # entries lie along consecutive rows
        where = TableMap.of(units[:, 0] // per_group, length)
        return None if where is None else (where, units[:, 0].numpy())
    across = ColumnMap.of(matrix, per_group, length)
    return None if across is None else (across, matrix[:, across.columns[:, 0]].numpy())
