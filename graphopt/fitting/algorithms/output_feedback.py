"""Tables and codes against the outputs of layers, with error feedback (GPTQ, arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override

from graphopt.fitting.algorithms.base import FittingAlgorithm
from graphopt.fitting.evidence import Evidence, Palettes
from graphopt.fitting.output_fit import fit_to_outputs
from graphopt.ir.program import Program

__all__ = ["OutputFeedback"]


class OutputFeedback(FittingAlgorithm):
    """Layer by layer, with the inputs that the compressed layers before give."""

    name: ClassVar[str] = "gptq"
    needs_inputs: ClassVar[bool] = True

    @override
    def fit(
        self, annotated: Program, names: Sequence[str], evidence: Evidence, result: Palettes
    ) -> None:
        fit = fit_to_outputs(annotated, names, evidence, result.weights)
        result.weights.update(fit.palettes)
        result.biases.update(fit.biases)
        result.remarks.extend(
            f"{name}: {why}; fitted without feedback" for name, why in fit.fallbacks.items()
        )
