"""Turn programs into what coreai-torch converts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from graphopt.backends.capabilities import ComplexNumbers
from graphopt.backends.casting import cast_to_16_bit_precision, op_predicate
from graphopt.backends.complex_numbers import in_real_parts
from graphopt.backends.coreai.decompose import RUNNING_SUMS, decompositions
from graphopt.backends.coreai.legalize import LegalizeForCoreAI
from graphopt.backends.coreai.legalize_quantization import LegalizeQuantizationForCoreAI
from graphopt.backends.coreai.merged_axes import keep_merged_axes
from graphopt.backends.coreai.options import CoreAIOptions
from graphopt.backends.data_sizes import decomposing_for
from graphopt.backends.float_types import as_float32
from graphopt.backends.interface import Interface, drop_written_inputs, flat_call, flat_interface
from graphopt.backends.promotion import promote_operands
from graphopt.backends.scalar_states import StatesWithAxes
from graphopt.backends.shapes import EXAMPLE_SHAPES, ShapePlan, refuse_fixed
from graphopt.ir.decomposing import decomposed
from graphopt.ir.program import Program, export_graph
from graphopt.passes import ExpandRangeRounding, IntegersToTables, RemoveUnused, WidenScales
from graphopt.passes.pass_base import Pass
from graphopt.passes.pass_manager import run_passes

__all__ = ["COMPLEX_NUMBERS", "LACKS", "TABLE_TYPES", "legal_export", "legal_passes"]

_INTERFACE = Interface()
LACKS = frozenset({torch.float64})
COMPLEX_NUMBERS: ComplexNumbers = "none"
TABLE_TYPES = ("uint2", "int3", "uint3", "int6", "uint6")


def legal_passes() -> tuple[Pass, ...]:
    """What turns our vocabulary into Core AI's."""
    return (
        ExpandRangeRounding(),
        WidenScales(),
        IntegersToTables(frozenset(TABLE_TYPES)),
        LegalizeQuantizationForCoreAI(),
        LegalizeForCoreAI(),
    )


def legal_export(
    program: Program, options: CoreAIOptions, plan: ShapePlan = EXAMPLE_SHAPES
) -> ExportedProgram:
    """The program in Core AI's ops, decomposed as coreai-torch wants it.

    Args:
        program: In our vocabulary.
        options: What to compute in.
        plan: Sizes of the inputs.
    """
    legal = as_float32(flat_interface(in_real_parts(program, COMPLEX_NUMBERS), _INTERFACE), LACKS)
    run_passes(legal.graph_module, [RemoveUnused(), *legal_passes(), StatesWithAxes()])
    with torch.no_grad(), decomposing_for("Core AI", legal.graph_module):
        exported = export_graph(
            legal.graph_module,
            legal.example_args,
            legal.example_kwargs,
            limits=plan.limits(legal),
        )
        _free_views(exported.graph)
        exported = decomposed(exported, decompositions())
    promote_operands(exported)
    keep_merged_axes(exported)
    drop_written_inputs(exported)
    refuse_fixed(exported, plan, "Core AI")
    if options.precision == "float32":
        return exported
    calls = [flat_call(call, _INTERFACE) for call in options.calibration_data or ()]
    with torch.no_grad():
        return cast_to_16_bit_precision(exported, _wide_ops(options.ignored_ops), calls)


def _wide_ops(ignored: Any) -> Callable[[fx.Node], bool]:
    """What computes in float32: what the user asks for, and running sums."""
    chosen = op_predicate(ignored)
    return lambda node: node.target in RUNNING_SUMS or chosen(node)


def _free_views(graph: fx.Graph) -> None:
    """Let views be of any memory layout: that of a decomposed op's result may be another one."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
