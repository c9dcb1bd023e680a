"""What is in a program: modules, ops and weights by the names that configs use, and sizes."""

from graphopt.inspection.summary import ModelReport, ModuleRow, inspect_program

__all__ = ["ModelReport", "ModuleRow", "inspect_program"]
