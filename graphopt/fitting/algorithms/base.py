"""What an algorithm is that finds the stored forms of weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic

from graphopt.fitting.evidence import Evidence, Fits, StoredT
from graphopt.ir.program import Program

__all__ = ["FittingAlgorithm"]


class FittingAlgorithm(ABC, Generic[StoredT]):
    """A value of the `algorithm` of a `PalettizationSpec` or a `QuantizationSpec`.

    Attributes:
        name: That value.
        needs_sensitivities: Whether squared gradients of the weights have to be collected for it.
        needs_inputs: Whether the calibration inputs have to be kept for it, and positions weighed.
    """

    name: ClassVar[str]
    needs_sensitivities: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False

    @abstractmethod
    def fit(
        self, annotated: Program, names: Sequence[str], evidence: Evidence, result: Fits[StoredT]
    ) -> None:
        """Find the forms of some weights.

        Args:
            annotated: A program whose weights are annotated; it is not changed.
            names: Weights to fit.
            evidence: What a calibration has seen.
            result: What other algorithms have found; takes what this one finds.
        """
