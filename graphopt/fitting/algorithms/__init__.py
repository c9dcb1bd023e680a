"""Algorithms that find tables and codes: one file each, and a line here."""

from graphopt.fitting.algorithms.base import FittingAlgorithm
from graphopt.fitting.algorithms.kmeans import KMeans
from graphopt.fitting.algorithms.output_feedback import OutputFeedback
from graphopt.fitting.algorithms.sensitive_kmeans import SensitiveKMeans

__all__ = ["ALGORITHMS", "CALIBRATED", "FittingAlgorithm"]

# by name, in the order in which they run: those that fit to outputs count the others as compressed
ALGORITHMS: dict[str, FittingAlgorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        KMeans(),
        SensitiveKMeans(),
        OutputFeedback(),
    )
}
CALIBRATED = SensitiveKMeans.name  # what "auto" stands for where there is a calibration
