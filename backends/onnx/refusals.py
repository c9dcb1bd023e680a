"""What ONNX, as ONNX Runtime computes it on the CPU, cannot hold."""

from __future__ import annotations

from graphopt.analysis.stored_values import find_lookups
from graphopt.backends.capabilities import (
    Capabilities,
    quantization_refusals,
)
from graphopt.ir.program import Program

__all__ = ["refusals"]


def refusals(program: Program, allowed: Capabilities) -> list[str]:
    """Why a program cannot be held, one line per reason.

    Args:
        program: In our vocabulary.
        allowed: What ONNX can hold.
    """
    gm = program.graph_module
    reasons = []
    for lookup in find_lookups(gm):
        if allowed.stored_bits(lookup.n_bits) is None:
            reasons.append(
                f"{lookup.name}: {lookup.n_bits}-bit indices; use one of {allowed.index_bits}"
            )
        if lookup.lut_dtype not in allowed.lut_dtypes:
            reasons.append(
                f"{lookup.name}: tables of {lookup.lut_dtype}; use one of {allowed.lut_dtypes}"
            )
    return [*reasons, *quantization_refusals(gm, allowed)]
