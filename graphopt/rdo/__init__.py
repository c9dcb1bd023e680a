"""Rate-distortion-optimised mixed-precision quantization after training."""

from graphopt.search.rdo.allocation import Allocation, allocate
from graphopt.search.rdo.as_pass import OptimizeRateDistortion
from graphopt.search.rdo.comparison import compare, uniform_program
from graphopt.search.rdo.config import BlockOptions, FeedbackOptions, RDOConfig, RoundingOptions
from graphopt.search.rdo.picture import draw_comparison
from graphopt.search.rdo.pipeline import Optimized, optimize
from graphopt.search.rdo.report import BlockReport, Comparison, LayerReport, RDOReport
from graphopt.search.rdo.session import BlockFit, Costs, Session

__all__ = [
    "Allocation",
    "BlockFit",
    "BlockOptions",
    "BlockReport",
    "Comparison",
    "Costs",
    "FeedbackOptions",
    "LayerReport",
    "OptimizeRateDistortion",
    "Optimized",
    "RDOConfig",
    "RDOReport",
    "RoundingOptions",
    "Session",
    "allocate",
    "compare",
    "draw_comparison",
    "optimize",
    "uniform_program",
]
