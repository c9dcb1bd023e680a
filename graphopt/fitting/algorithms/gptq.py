"""Stored forms against the outputs of layers, by error feedback (GPTQ, arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override

from graphopt.fitting.algorithms.base import FittingAlgorithm
from graphopt.fitting.evidence import Evidence, Integers, Palettes
from graphopt.fitting.integer_fit import EMBEDDING, fit_integers
from graphopt.fitting.output_fit import fit_to_outputs
from graphopt.ir.program import Program
from graphopt.schemes.palettize import PalettizedWeight
from graphopt.schemes.quantize import QuantizedWeight

__all__ = ["INTEGERS", "TABLES", "IntegerFeedback", "OutputFeedback"]


class OutputFeedback(FittingAlgorithm[PalettizedWeight]):
    """Tables and codes, layer by layer, with the inputs that the compressed layers before give."""

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


class IntegerFeedback(FittingAlgorithm[QuantizedWeight]):
    """Integers, layer by layer, with the inputs that compressed layers give, rounded where they are."""

    name: ClassVar[str] = "gptq"
    needs_inputs: ClassVar[bool] = True

    @override
    def fit(
        self, annotated: Program, names: Sequence[str], evidence: Evidence, result: Integers
    ) -> None:
        fit = fit_integers(annotated.graph_module, names, evidence)
        result.weights.update(fit.weights)
        result.biases.update(fit.biases)
        result.remarks.extend(
            f"{name}: {why}; rounded without feedback"
            for name, why in fit.fallbacks.items()
            if why != EMBEDDING
        )


TABLES = OutputFeedback()
INTEGERS = IntegerFeedback()
