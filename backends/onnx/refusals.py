"""What ONNX, as ONNX Runtime computes it on the CPU, cannot hold."""

from __future__ import annotations

from graphopt.analysis.stored_values import find_lookups
from graphopt.backends.capabilities import (
    Capabilities,
    bfloat16_values,
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
    return [*reasons, *quantization_refusals(gm, allowed), *_bfloat16(program)]


def _bfloat16(program: Program) -> list[str]:
    """A line for the first value in bfloat16, of which the runtime's CPU kernels know nothing."""
    names = bfloat16_values(program.graph_module)
    if not names:
        return []
    return [
        f"{names[0]}: bfloat16 values, for which ONNX Runtime has no kernels on the CPU; call"
        " .float() or .half() on the model before it is captured"
    ]
