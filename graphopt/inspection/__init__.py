"""What is in a program and what compression did to it: names, sizes, bits, errors, pages."""

from graphopt import moved
from graphopt.report.bits import BitsPerWeightResult, bits_per_weight
from graphopt.report.difference import Difference, LayerDifference, diff
from graphopt.report.drawing import save_graph
from graphopt.report.inspector import ModelInspector
from graphopt.report.model import (
    BoundaryEdge,
    InputEdge,
    ModelSummary,
    ModuleContext,
    ModuleInfo,
    OpInfo,
    SourceFrame,
)
from graphopt.report.page import write_page
from graphopt.report.summary import ModelReport, ModuleRow, inspect_program

__all__ = [
    "BitsPerWeightResult",
    "BoundaryEdge",
    "Difference",
    "InputEdge",
    "LayerDifference",
    "ModelInspector",
    "ModelReport",
    "ModelSummary",
    "ModuleContext",
    "ModuleInfo",
    "ModuleRow",
    "OpInfo",
    "SourceFrame",
    "bits_per_weight",
    "diff",
    "inspect_program",
    "save_graph",
    "write_page",
]

moved.provide(__name__)
