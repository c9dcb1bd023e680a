"""What passes made of a program, as one that can be reported and saved."""

from __future__ import annotations

import copy

from graphopt.backends.lowering import lower_by_suffix
from graphopt.ir.program import CompressedProgram, Program

__all__ = ["compressed"]


def compressed(program: Program) -> CompressedProgram:
    """What passes made of a program, as one that can be reported and saved."""
    return CompressedProgram(
        # the original weights are gone by now; what is copied here is small
        graph_module=copy.deepcopy(program.graph_module),
        example_args=program.example_args,
        example_kwargs=program.example_kwargs,
        provenance=program.provenance,
        lower_with=lower_by_suffix,
    )
