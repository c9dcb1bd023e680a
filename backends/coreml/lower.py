"""Turn programs into what coremltools converts."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch.export import ExportedProgram

from graphopt.analysis.quantized import quantized_ops
from graphopt.backends.capabilities import ComplexNumbers
from graphopt.backends.complex_numbers import in_real_parts
from graphopt.backends.coreml.decompose import decompose_for_coreml
from graphopt.backends.coreml.halves import HalvesToSingle
from graphopt.backends.coreml.lowerings import register_lowerings
from graphopt.backends.coreml.names import leave_names
from graphopt.backends.coreml.refusals import PACKED, refusals
from graphopt.backends.coreml.states import HalfStates, state_refusals
from graphopt.backends.data_sizes import decomposing_for
from graphopt.backends.float_types import as_float32
from graphopt.backends.interface import Interface, drop_written_inputs, flat_interface
from graphopt.backends.promotion import promote_operands
from graphopt.backends.quiet import quiet
from graphopt.backends.shapes import EXAMPLE_SHAPES, ShapePlan, refuse_fixed
from graphopt.errors import LoweringError
from graphopt.exclusive import patched
from graphopt.ir.program import Program, export_graph
from graphopt.passes import (
    DequantizeToShiftScale,
    ExpandRangeRounding,
    IntegersToTables,
    RemoveUnused,
    WidenScales,
)
from graphopt.passes.pass_base import Pass
from graphopt.passes.pass_manager import run_passes

__all__ = [
    "COMPLEX_NUMBERS",
    "INTERFACE",
    "LACKS",
    "TABLE_TYPES",
    "legal_export",
    "legal_passes",
    "small_constants_once",
]

LACKS = frozenset({torch.float64, torch.bfloat16})
COMPLEX_NUMBERS: ComplexNumbers = "none"
INTERFACE = Interface(
    types={
        torch.uint8: torch.int32,
        torch.int8: torch.int32,
        torch.int16: torch.int32,
        torch.bfloat16: torch.float32,
        torch.float64: torch.float32,
    },
    keeps_copies=False,
)
TABLE_TYPES = ("int2", "uint2", "int3", "uint3", "int6", "uint6")


def legal_passes() -> tuple[Pass, ...]:
    """What turns our vocabulary into what coremltools is taught to translate."""
    with quiet("coremltools"):
        register_lowerings()
    tables = frozenset(TABLE_TYPES)
    return (
        ExpandRangeRounding(),
        DequantizeToShiftScale(),
        WidenScales(bfloat16=True),
        IntegersToTables(tables),
    )


def legal_export(
    program: Program, target: str, *last: Pass, plan: ShapePlan = EXAMPLE_SHAPES
) -> ExportedProgram:
    """The program in ops that coremltools translates.

    Args:
        program: In our vocabulary.
        target: Deployment target.
        last: Passes to run last.
        plan: Sizes of the inputs.

    Raises:
        LoweringError: The deployment target cannot hold the program.
    """
    if target in ("iOS16", "iOS17"):
        reasons = [*refusals(program, PACKED, target), *state_refusals(program, target)]
        if reasons:
            raise LoweringError("Core ML cannot hold this program:\n" + "\n".join(reasons))
    quantized_ops()
    register_lowerings()
    legal = as_float32(flat_interface(in_real_parts(program, COMPLEX_NUMBERS), INTERFACE), LACKS)
    passes = [
        RemoveUnused(),
        *legal_passes(),
        RemoveUnused(),
        HalvesToSingle(),
        HalfStates(),
        *last,
    ]
    run_passes(legal.graph_module, passes)
    with torch.no_grad(), decomposing_for("Core ML", legal.graph_module):
        exported = decompose_for_coreml(
            export_graph(
                legal.graph_module,
                legal.example_args,
                legal.example_kwargs,
                limits=plan.limits(legal),
            )
        )
    promote_operands(exported)
    drop_written_inputs(exported)
    refuse_fixed(exported, plan, "Core ML")
    leave_names(exported)
    return exported


def small_constants_once() -> AbstractContextManager[None]:
    """Let coremltools keep one copy of equal strides, paddings and the like.

    They are a third of a program's text. Its pass has the threshold as a class attribute, which is
    put back.
    """
    from coremltools.converters.mil.mil.passes.defs.cleanup.const_deduplication import (
        const_deduplication,
    )

    return patched(const_deduplication, _const_threshold=1)
