"""k-means weighed by the loss's squared gradients (SqueezeLLM, arXiv 2306.07629, equation 3)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override

from graphopt.fitting.algorithms.kmeans import KMeans
from graphopt.fitting.evidence import Evidence, Palettes
from graphopt.ir.program import Program

__all__ = ["TABLES", "SensitiveKMeans"]

_log = logging.getLogger(__name__)


class SensitiveKMeans(KMeans):
    """Least squared error of the weights, each element by its sensitivity."""

    name: ClassVar[str] = "skm"
    needs_sensitivities: ClassVar[bool] = True

    @override
    def fit(
        self, annotated: Program, names: Sequence[str], evidence: Evidence, result: Palettes
    ) -> None:
        for name in names:
            reached = evidence.sensitivities.get(name)
            if reached is None or not bool(reached.any()):
                remark = f"{name}: no gradient reached it; clustered without weights"
                _log.warning("%s", remark)
                result.remarks.append(remark)
        super().fit(annotated, names, evidence, result)


TABLES = SensitiveKMeans()
