"""The nearest representable values of each weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override

from graphopt.analysis.weights import find_weights
from graphopt.fitting.algorithms.base import FittingAlgorithm
from graphopt.fitting.evidence import Evidence, Integers
from graphopt.ir.annotations import quantization_annotation
from graphopt.ir.program import Program
from graphopt.schemes.base import Statistics
from graphopt.schemes.quantize import Quantization, QuantizedWeight

__all__ = ["INTEGERS", "Nearest"]


class Nearest(FittingAlgorithm[QuantizedWeight]):
    """Scales of the weights' own ranges, and the nearest values on their grids."""

    name: ClassVar[str] = "nearest"

    @override
    def fit(
        self, annotated: Program, names: Sequence[str], evidence: Evidence, result: Integers
    ) -> None:
        for weight in find_weights(annotated.graph_module):
            annotation = quantization_annotation(weight.nodes[0])
            if annotation is not None and weight.name in names:
                known = Statistics(annotation.output_axis, seed=evidence.seed)
                made = Quantization().make(weight.tensor.detach(), annotation.spec, known)
                result.weights[weight.name] = made


INTEGERS = Nearest()
