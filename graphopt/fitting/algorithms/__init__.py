"""Algorithms that find the stored forms of weights: one file each, named by its word in a spec.

What a word of a spec's `algorithm` does is in the file of that name, as `TABLES` for palettes and as
`INTEGERS` for quantized weights.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, get_args

from graphopt.fitting.algorithms.base import FittingAlgorithm
from graphopt.fitting.algorithms.gptq import IntegerFeedback, OutputFeedback
from graphopt.fitting.algorithms.skm import SensitiveKMeans
from graphopt.schemes.palettize import PalettizedWeight
from graphopt.schemes.quantize import QuantizedWeight
from graphopt.specs import PalettizationSpec, QuantizationSpec
from graphopt.specs.model import SpecModel

__all__ = [
    "ALGORITHMS",
    "CALIBRATED",
    "CALIBRATED_INTEGERS",
    "INTEGER_ALGORITHMS",
    "FittingAlgorithm",
    "calibrated_word",
]


def _algorithms(spec: type[SpecModel], form: str) -> dict[str, Any]:
    """By the words of a spec's `algorithm`; "auto" is one of the others, which depends on the data."""
    words = get_args(spec.model_fields["algorithm"].annotation)
    return {
        word: getattr(import_module(f"{__name__}.{word}"), form) for word in words if word != "auto"
    }


# by name, in the order in which they run: those that fit to outputs count the others as compressed
ALGORITHMS: dict[str, FittingAlgorithm[PalettizedWeight]] = _algorithms(PalettizationSpec, "TABLES")
INTEGER_ALGORITHMS: dict[str, FittingAlgorithm[QuantizedWeight]] = _algorithms(
    QuantizationSpec, "INTEGERS"
)
# what "auto" stands for where there is a calibration
CALIBRATED = OutputFeedback.name
CALIBRATED_INTEGERS = IntegerFeedback.name


def calibrated_word(spec: PalettizationSpec, *, feedable: bool) -> str:
    """The algorithm that a spec's `algorithm` stands for where there is a calibration.

    Args:
        spec: What a weight becomes.
        feedable: Whether one op reads the weight as a matrix, so that its errors can be fed on.
    """
    if spec.algorithm != "auto":
        return spec.algorithm
    return CALIBRATED if feedable and not spec.outlier_fraction else SensitiveKMeans.name
