"""Scales that weigh what a weight costs in an entropy coder against its error."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.analysis.matrix_form import MatrixUse
from graphopt.numerics.affine import (
    QParams,
    dequantize,
    grid_of,
    has_whole_offsets,
    qparams,
    quantize,
)
from graphopt.numerics.blocks import Blocks
from graphopt.schemes.quantize import scale_precision, weight_range
from graphopt.schemes.sizes import entropy
from graphopt.specs import QuantizationSpec

__all__ = ["scales_by_rate"]

_STEPS = tuple(2.0 ** (step / 4) for step in range(-6, 29))
_ROUNDS = 4


def scales_by_rate(
    weight: Tensor,
    spec: QuantizationSpec,
    blocks: Blocks,
    use: MatrixUse,
    hessian: Tensor,
    rate_weight: float,
    importance: Tensor | None,
) -> QParams:
    """Scale of each block that minimises `D + λ·R`.

    D is half the squared error, weighed by the diagonal of the Hessian and by what the loss feels at
    each output row; R is `−log₂` of how frequent each element is in the tensor. Frequencies and
    scales are found in turns (entropy-constrained quantization, Chou, Lookabaugh, Gray, IEEE TASSP
    37(1), 1989).

    Args:
        weight: The stored tensor.
        spec: Element type and scheme; coarser steps than its range needs leave elements unused.
        blocks: Which elements share a scale.
        use: The op that reads it.
        hessian: Second moment of the op's columns, [groups, columns, columns].
        rate_weight: λ, loss per bit.
        importance: Cost of a squared error at each output row, [rows] over all groups; None is 1.
    """
    matrix = use.matrix(weight, casts=False)
    level = hessian.diagonal(dim1=1, dim2=2)[:, None, :].expand_as(matrix).double()
    if importance is not None:
        level = level * importance.double().reshape(level.shape[0], -1, 1)
    costs = blocks.split(use.pull_back(level.contiguous(), weight.shape)).float()
    groups = blocks.split(weight.float())
    low, high = (bound.reshape(-1) for bound in weight_range(weight, spec, blocks))
    grid, whole = grid_of(spec), has_whole_offsets(spec)
    precision = scale_precision(weight, spec)
    size = int(grid.q_max - grid.q_min) + 1
    options = [qparams(low * step, high * step, spec, precision) for step in _STEPS]

    def errors(option: QParams) -> tuple[Tensor, Tensor]:
        scale, offset = option
        shift = None if offset is None else offset[:, None]
        codes = quantize(groups, scale[:, None], shift, grid, whole=whole)
        error = (groups - dequantize(codes, scale[:, None], shift)).square_().mul_(costs).sum(1)
        # symbols count from the zero point, where weights are dense
        symbols = codes if shift is None else codes - shift.round()
        return symbols.long() + size, error.double()

    # one step for all blocks, relative to their ranges, by the entropy that it really gives
    total = []
    for option in options:
        codes, error = errors(option)
        bits = entropy(torch.bincount(codes.reshape(-1)))
        total.append(0.5 * float(error.sum()) + rate_weight * bits)
    best = torch.full((len(groups),), int(torch.tensor(total).argmin()))
    for _ in range(_ROUNDS):
        codes, _ = errors(_at(options, best))
        counts = torch.bincount(codes.reshape(-1), minlength=2 * size + 1).double()
        counts += 1 / len(counts)  # what was not seen can still be coded
        length = -(counts / counts.sum()).log2()
        objectives = []
        for option in options:
            codes, error = errors(option)
            objectives.append(0.5 * error + rate_weight * length[codes].sum(1))
        chosen = torch.stack(objectives).argmin(0)
        if bool((chosen == best).all()):
            break
        best = chosen
    scale, offset = _at(options, best)
    shape = blocks.counts
    return scale.reshape(shape), None if offset is None else offset.reshape(shape)


def _at(options: list[QParams], place: Tensor) -> QParams:
    scales = torch.stack([scale for scale, _ in options])
    chosen = scales.gather(0, place[None])[0]
    zeros = torch.zeros_like(chosen)
    shifts = torch.stack([zeros if offset is None else offset for _, offset in options])
    shift = shifts.gather(0, place[None])[0]
    return chosen, shift if bool(shift.any()) else None
