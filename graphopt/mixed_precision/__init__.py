"""Mixed precision: which layer gets how many bits."""

from graphopt.mixed_precision.solvers import (
    Problem,
    Solution,
    front,
    solve_exactly,
    solve_greedily,
    solve_on_hull,
)

__all__ = ["Problem", "Solution", "front", "solve_exactly", "solve_greedily", "solve_on_hull"]
