"""What the compressed forms of one layer are fitted to, tables, vectors and integers alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graphopt.analysis.matrix_form import MatrixUse
from graphopt.fitting.channel_moments import moved_bias
from graphopt.fitting.moments import LayerMoments, bias_change, compensated_weight
from graphopt.fitting.output_loss import OutputLoss
from graphopt.numerics.feedback import OrderedHessian

__all__ = ["LayerTarget"]


@dataclass(frozen=True)
class LayerTarget:
    """A layer under the compressed layers before it.

    Attributes:
        use: The op that reads the weight.
        original: The stored tensor.
        weight: What to aim at, of its shape.
        moments: Of the op's inputs.
        ordered: What feedback makes of the Hessian once for all fits; None for several groups, or
            where there is one fit.
    """

    use: MatrixUse
    original: Tensor
    weight: Tensor
    moments: LayerMoments
    ordered: OrderedHessian | None = None

    @classmethod
    def of(
        cls,
        use: MatrixUse,
        original: Tensor,
        moments: LayerMoments,
        *,
        compensate: bool = True,
        damping: float | None = None,
    ) -> LayerTarget:
        """The target of a layer.

        Args:
            use: The op that reads the weight.
            original: The stored tensor.
            moments: From `collect_moments`.
            compensate: Aim at the weight that makes up for what the inputs have lost.
            damping: That of several fits by feedback; None orders nothing ahead.
        """
        moments = moments.shrunk()
        weight = compensated_weight(use, original, moments) if compensate else original
        ordered = None
        if damping is not None and moments.hessian.shape[0] == 1:
            ordered = OrderedHessian.of(moments.hessian[0], damping)
        return cls(use, original, weight, moments, ordered)

    @property
    def hessian(self) -> Tensor:
        """Second moment of the op's columns, [groups, columns, columns]."""
        return self.moments.hessian

    def loss(self, damping: float = 0.01) -> OutputLoss:
        """What errors of the weight cost.

        Args:
            damping: Share of the mean diagonal that feedback adds; that of `ordered`, where it is.
        """
        return OutputLoss(self.use, self.hessian, damping=damping, ordered=self.ordered)

    def bias(self, exact: Tensor, compressed: Tensor) -> Tensor:
        """The op's bias when another weight takes the place of the stored one, in its own type.

        Args:
            exact: The bias of the exact program.
            compressed: The weight.
        """
        change = bias_change(self.use, self.original, compressed, self.moments)
        return moved_bias(exact, change)
