"""Rate-distortion-optimised mixed-precision quantization after training."""

from graphopt.rdo.allocation import Allocation, allocate
from graphopt.rdo.as_pass import OptimizeRateDistortion
from graphopt.rdo.comparison import compare, uniform_program
from graphopt.rdo.config import BlockOptions, FeedbackOptions, RDOConfig, RoundingOptions
from graphopt.rdo.picture import draw_comparison
from graphopt.rdo.pipeline import Optimized, optimize
from graphopt.rdo.report import BlockReport, Comparison, LayerReport, RDOReport
from graphopt.rdo.session import BlockFit, Costs, Session

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
