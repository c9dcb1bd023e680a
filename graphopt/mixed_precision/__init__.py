"""Mixed precision: which layer gets how many bits."""

from graphopt.search.mixed_precision.analysis import analyze
from graphopt.search.mixed_precision.candidates import Candidate, as_candidates
from graphopt.search.mixed_precision.metrics import METRICS, Metric
from graphopt.search.mixed_precision.recipe import Recipe
from graphopt.search.mixed_precision.sensitivity_table import SensitivityTable
from graphopt.search.mixed_precision.sizes import SizeModel
from graphopt.search.mixed_precision.solvers import (
    Problem,
    Solution,
    front,
    solve_exactly,
    solve_greedily,
    solve_near,
    solve_on_hull,
)
from graphopt.search.mixed_precision.sweep import Point, Sweep

__all__ = [
    "METRICS",
    "Candidate",
    "Metric",
    "Point",
    "Problem",
    "Recipe",
    "SensitivityTable",
    "SizeModel",
    "Solution",
    "Sweep",
    "analyze",
    "as_candidates",
    "front",
    "solve_exactly",
    "solve_greedily",
    "solve_near",
    "solve_on_hull",
]
