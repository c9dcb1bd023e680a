"""What is in a program and what compression did to it: names, sizes, bits, errors, pages."""

from graphopt.inspection.bits import BitsPerWeightResult, bits_per_weight
from graphopt.inspection.difference import Difference, LayerDifference, diff
from graphopt.inspection.drawing import save_graph
from graphopt.inspection.inspector import ModelInspector
from graphopt.inspection.model import (
    BoundaryEdge,
    InputEdge,
    ModelSummary,
    ModuleContext,
    ModuleInfo,
    OpInfo,
    SourceFrame,
)
from graphopt.inspection.page import write_page
from graphopt.inspection.summary import ModelReport, ModuleRow, inspect_program

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
