"""Linear quantization against a layer's outputs: scales by search, elements by error feedback.

Minimises `Σ_rows (w_r − q_r)ᵀ H (w_r − q_r)` with H the second moment of the layer's inputs. Elements
come from column-wise error feedback and coordinate descent (`graphopt.numerics.feedback`; Frantar et
al., GPTQ, arXiv 2210.17323, algorithm 1). For given elements v (the integers less the zero point) the
best scale of a row is `s = vᵀHw / vᵀHv`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphopt.analysis.matrix_form import MatrixUse
from graphopt.errors import CompressionError
from graphopt.fitting.importance import element_importance
from graphopt.fitting.output_loss import OutputLoss, row_losses
from graphopt.numerics.affine import (
    QParams,
    dequantize,
    grid_of,
    has_whole_offsets,
    qparams,
    quantize,
)
from graphopt.numerics.blocks import Blocks
from graphopt.numerics.device import chosen_device
from graphopt.numerics.feedback import OrderedHessian, TableMap, feedback_grouped, fit_tables
from graphopt.numerics.finite import all_finite
from graphopt.schemes.quantize import (
    QuantizedWeight,
    scale_precision,
    store_weight,
    weight_range,
)
from graphopt.specs import QuantizationSpec

__all__ = [
    "best_scale",
    "grid_values",
    "needs_little",
    "quantize_to_outputs",
    "search_scales",
    "table_map",
]

_FLOOR = 1e-3  # of the mean importance
_FINE = 128  # elements of a grid from which on moved scales are worth less than they cost


def grid_values(spec: QuantizationSpec) -> Tensor:
    """All values of an element type, increasing, float32."""
    grid = grid_of(spec)
    if not grid.is_float:
        return torch.arange(int(grid.q_min), int(grid.q_max) + 1, dtype=torch.float32)
    if grid.storage == "fp4_e2m1":
        half = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        return torch.cat([half, -half]).unique()
    kind = torch.float8_e4m3fn if grid.storage == "fp8_e4m3" else torch.float8_e5m2
    values = torch.arange(256, dtype=torch.uint8).view(kind).to(torch.float32)
    return values[torch.isfinite(values)].unique()


def _is_fine(spec: QuantizationSpec) -> bool:
    """Whether a grid is so fine that the choices of elements hardly depend on one another: 8 bits."""
    return len(grid_values(spec)) >= _FINE


def needs_little(spec: QuantizationSpec, use: MatrixUse) -> bool:
    """Whether few positions and one pass of feedback do: for convolutions with elements of 8 bits.

    Neighbouring positions of an image say nearly the same, and what coordinate descent gains beyond the
    pass, 0.2 dB in a transformer's linear layers, was nothing there.
    """
    return bool(use.form.kernel) and _is_fine(spec)


def table_map(use: MatrixUse, blocks: Blocks) -> TableMap | None:
    """The block of each weight of the op's matrix; None where blocks are not rows × columns."""
    numbers = blocks.spread(torch.arange(blocks.n_blocks).reshape(blocks.counts))
    whole = numbers.expand(blocks.shape).contiguous()
    if use.matrix(whole, casts=False).numel() != whole.numel():
        return None
    return TableMap.of(use.matrix(whole, casts=False).flatten(0, 1))


def search_scales(
    weight: Tensor, spec: QuantizationSpec, blocks: Blocks, use: MatrixUse, hessian: Tensor
) -> QParams:
    """Scales (and zero points) of least error when elements are rounded to the nearest.

    Errors count by the diagonal of H: ranges are shrunk from the weight's own, both ends apart where
    the scheme has zero points.

    Args:
        weight: The stored tensor.
        spec: Element type and scheme.
        blocks: Which elements share a scale.
        use: The op that reads it.
        hessian: Second moment of the op's columns, [groups, columns, columns].
    """
    importance = element_importance(use, weight, hessian, floor=_FLOOR)
    low, high = weight_range(weight, spec, blocks, importance)
    return qparams(low, high, spec, scale_precision(weight, spec))


def quantize_to_outputs(
    weight: Tensor,
    spec: QuantizationSpec,
    blocks: Blocks,
    loss: OutputLoss,
    *,
    scales: QParams | None = None,
    move_scales: bool = True,
    rounds: int = 3,
) -> QuantizedWeight | None:
    """Quantize one weight so that its op's outputs change little.

    Args:
        weight: The stored tensor.
        spec: Element type, scheme and granularity.
        blocks: From `plan_blocks`.
        loss: What its errors cost; all rows alike.
        scales: Scales and zero points to start from, of shape `blocks.counts`; those of least error
            under the diagonal of H when None.
        move_scales: Whether scales follow the elements; needs one block per row or more rows per
            block, an op of one channel group, and scales that are no powers of two.
        rounds: Alternations of elements and scales.

    Grids of 8 bits keep their scales: two more rounds with moved ones are worth less than 0.1 dB of a net's
    outputs, and two thirds of the time.

    Returns:
        The stored form of least error that was met, never worse than rounding to the nearest; None
        where blocks are not rows × columns of the matrix.

    Raises:
        CalibrationError: H is not finite.
        CompressionError: The weight contains NaN or Inf.
    """
    if not all_finite(weight):
        raise CompressionError("contains NaN or Inf")
    use, hessian, ordered = loss.use, loss.hessian, loss.ordered
    where = table_map(use, blocks)
    if where is None:
        return None
    scale, offset = search_scales(weight, spec, blocks, use, hessian) if scales is None else scales
    powers = spec.scale_dtype is not None and "e8m0" in str(spec.scale_dtype)
    if hessian.shape[0] == 1 and ordered is None:
        ordered = OrderedHessian.of(hessian[0], loss.damping)
    problem = _Problem(weight, spec, blocks, use, hessian.float(), where, loss.damping, ordered)
    rounds = 1 if _is_fine(spec) else rounds
    best = problem.rounded(scale, offset)
    last = best.loss
    for number in range(max(rounds, 1)):
        candidate = problem.fed_back(scale, offset)
        if candidate.loss < best.loss:
            best = candidate
        elif number:
            break
        movable = move_scales and where.by_rows and hessian.shape[0] == 1 and not powers
        if not movable or number + 1 == rounds or last - candidate.loss <= 1e-4 * last:
            break
        last = candidate.loss
        scale = problem.rescaled(candidate)
    return store_weight(weight, best.stored, best.scale, best.offset, spec, blocks)


@dataclass(frozen=True)
class _Candidate:
    stored: Tensor  # elements of the weight's shape
    scale: Tensor
    offset: Tensor | None
    loss: float


@dataclass(frozen=True)
class _Problem:
    weight: Tensor
    spec: QuantizationSpec
    blocks: Blocks
    use: MatrixUse
    hessian: Tensor
    where: TableMap
    damping: float
    ordered: OrderedHessian | None  # of an op with one channel group

    def rounded(self, scale: Tensor, offset: Tensor | None) -> _Candidate:
        """Elements nearest to the weight."""
        stored = quantize(
            self.weight.detach(),
            self.blocks.spread(scale),
            None if offset is None else self.blocks.spread(offset),
            grid_of(self.spec),
            whole=has_whole_offsets(self.spec),
        )
        return self._of(stored, scale, offset)

    def fed_back(self, scale: Tensor, offset: Tensor | None) -> _Candidate:
        """Elements whose errors later columns make up for."""
        values = grid_values(self.spec)
        shift = 0.0 if offset is None else offset.reshape(-1, 1)
        tables = (scale.float().reshape(-1, 1) * (values[None] - shift))[..., None].contiguous()
        matrix = self.use.matrix(self.weight, casts=False).float()
        if self.ordered is None:
            codes = feedback_grouped(matrix, self.hessian, tables, self.where, self.damping)
        else:
            cycles = 0 if needs_little(self.spec, self.use) else 2
            codes = fit_tables(
                matrix[0],
                self.ordered,
                tables,
                self.where,
                rounds=1,
                cycles=cycles,
                move_tables=False,
            ).codes
        chosen = values[codes.long()].reshape(matrix.shape)
        stored = self.use.pull_back(chosen, self.weight.shape).contiguous()
        return self._of(stored, scale, offset)

    def _of(self, stored: Tensor, scale: Tensor, offset: Tensor | None) -> _Candidate:
        wide_offset = None if offset is None else self.blocks.spread(offset)
        dense = dequantize(stored, self.blocks.spread(scale), wide_offset)
        gap = self.use.matrix(self.weight.float() - dense, casts=False)
        if chosen_device() is None:
            loss = float(((gap @ self.hessian) * gap).double().sum())
        else:
            loss = float(row_losses(gap, self.hessian).double().sum())
        return _Candidate(stored, scale, offset, loss)

    def rescaled(self, candidate: _Candidate) -> Tensor:
        """The best scales for given elements, rounded as they are stored."""
        offset = 0.0 if candidate.offset is None else self.blocks.spread(candidate.offset)
        moved = self.use.matrix(candidate.stored - offset, casts=False)[0]
        wanted = self.use.matrix(self.weight.float(), casts=False)[0]
        best = best_scale(
            wanted, moved, self.hessian[0], candidate.scale.reshape(-1), self.where.rows
        ).reshape(candidate.scale.shape)
        precision = scale_precision(self.weight, self.spec)
        return best.to(precision).float()


def best_scale(
    weight: Tensor,
    elements: Tensor,
    hessian: Tensor,
    scale: Tensor,
    rows: npt.NDArray[np.int64],
) -> Tensor:
    """Scales of least error for given elements, `s = Σ vᵀHw / Σ vᵀHv` over the rows of each.

    Args:
        weight: [rows, columns].
        elements: Integers less the zero point, [rows, columns].
        hessian: [columns, columns].
        scale: What a scale without elements keeps, [scales].
        rows: Scale of each row.

    Returns:
        [scales] float32; a scale that would not be positive keeps its value.
    """
    moved = (elements.float() @ hessian.float()).double()
    above = (moved * weight).sum(1)
    below = (moved * elements).sum(1)
    own = torch.from_numpy(rows)
    total = torch.zeros(2, len(scale), dtype=torch.float64)
    total[0].index_add_(0, own, above)
    total[1].index_add_(0, own, below)
    best = (total[0] / total[1].clamp_min(1e-300)).float()
    usable = torch.isfinite(best) & (best > 0) & (total[1] > 0)
    return torch.where(usable, best, scale.float())
