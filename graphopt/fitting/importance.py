"""What a squared error of each element of a weight counts at its op's outputs."""

from __future__ import annotations

from torch import Tensor

from graphopt.analysis.matrix_form import MatrixUse

__all__ = ["element_importance"]


def element_importance(
    use: MatrixUse,
    weight: Tensor,
    hessian: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    floor: float = 0.0,
) -> Tensor:
    """The diagonal of the Hessian and weights of rows, as elements of the stored tensor.

    Args:
        use: The op that reads the weight.
        weight: The stored tensor.
        hessian: Second moment of the op's columns, [groups, columns, columns]; None is the identity.
        rows: Weight of each row's error, [groups, rows]; None is 1.
        floor: The least value, relative to the mean: what calibration never saw still counts.

    Returns:
        float32, of the stored tensor's shape.
    """
    matrix = use.matrix(weight, casts=False)
    level = matrix.new_ones(()).float()
    if rows is not None:
        level = level * rows[:, :, None].float()
    if hessian is not None:
        level = level * hessian.diagonal(dim1=1, dim2=2)[:, None, :].float()
    level = level.expand_as(matrix)
    if floor > 0:
        level = level.clamp_min(floor * float(level.mean()))
    return use.pull_back(level.contiguous(), weight.shape).contiguous()
