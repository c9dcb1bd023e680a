"""What the error of a weight costs at the outputs of the op that reads it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graphopt.analysis.matrix_form import MatrixUse
from graphopt.numerics.feedback import OrderedHessian

__all__ = ["OutputLoss"]


@dataclass(frozen=True)
class OutputLoss:
    """The loss `Σ_r i_r (w_r − q_r)ᵀ H (w_r − q_r)` over the rows of the matrix of a weight.

    Attributes:
        use: The op that reads the weight, which says how it is a matrix.
        hessian: H, the second moment of the op's columns, [groups, columns, columns].
        row_importance: Weight i of each row's error, [groups, rows]; None is 1.
        damping: Share of the mean diagonal that feedback adds to H.
        ordered: `OrderedHessian.of(hessian[0], damping)`, where several fits share it.
    """

    use: MatrixUse
    hessian: Tensor
    row_importance: Tensor | None = None
    damping: float = 0.01
    ordered: OrderedHessian | None = None
