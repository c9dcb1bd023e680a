"""What Core AI cannot hold."""

from __future__ import annotations

from graphopt.analysis.stored_values import find_lookups
from graphopt.backends.capabilities import Capabilities, quantization_refusals
from graphopt.ir.program import Program

__all__ = ["refusals"]


def refusals(program: Program, allowed: Capabilities) -> list[str]:
    """Why a program cannot be held, one line per reason.

    Args:
        program: In our vocabulary.
        allowed: What Core AI can hold.
    """
    reasons = []
    for lookup in find_lookups(program.graph_module):
        stored = allowed.stored_bits(lookup.n_bits)
        if stored is None:
            reasons.append(
                f"{lookup.name}: {lookup.n_bits}-bit indices; the nearest that work are"
                f" {allowed.index_bits}"
            )
        if lookup.lut_dtype not in allowed.lut_dtypes:
            reasons.append(
                f"{lookup.name}: tables of {lookup.lut_dtype}; use one of {allowed.lut_dtypes}"
            )
    return [*reasons, *quantization_refusals(program.graph_module, allowed)]
