"""k-means on the weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override

from graphopt.fitting.algorithms.base import FittingAlgorithm
from graphopt.fitting.clustering import cluster_annotated
from graphopt.fitting.evidence import Evidence, Palettes
from graphopt.ir.program import Program
from graphopt.numerics.device import computing_on
from graphopt.schemes.palettize import PalettizedWeight

__all__ = ["TABLES", "KMeans"]


class KMeans(FittingAlgorithm[PalettizedWeight]):
    """Least squared error of the weights."""

    name: ClassVar[str] = "kmeans"

    @override
    def fit(
        self, annotated: Program, names: Sequence[str], evidence: Evidence, result: Palettes
    ) -> None:
        with computing_on(evidence.resources.device):
            result.weights.update(
                cluster_annotated(
                    annotated.graph_module,
                    progress=evidence.progress,
                    seed=evidence.seed,
                    importance=evidence.sensitivities if self.needs_sensitivities else None,
                    names=names,
                    executor=evidence.resources.executor,
                )
            )


TABLES = KMeans()
