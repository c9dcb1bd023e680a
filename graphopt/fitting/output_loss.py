"""What the error of a weight costs at the outputs of the op that reads it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graphopt.analysis.matrix_form import MatrixUse
from graphopt.numerics.device import chosen_device
from graphopt.numerics.feedback import OrderedHessian

__all__ = ["OutputLoss", "row_losses"]


def row_losses(gap: Tensor, hessian: Tensor) -> Tensor:
    """`gᵀ H g` of each row g, on the device that computes, [groups, rows] float32 on the CPU.

    Args:
        gap: What a weight's rows lack, [groups, rows, columns] float32.
        hessian: [groups, columns, columns].
    """
    device = chosen_device() or gap.device
    own, squares = gap.to(device), hessian.float().to(device)
    return ((own @ squares) * own).sum(2).cpu()


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
