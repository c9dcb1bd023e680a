"""Turn programs into what coreai-torch converts."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from graphopt.backends.casting import cast_to_16_bit_precision
from graphopt.backends.coreai.legalize import LegalizeForCoreAI
from graphopt.backends.coreai.legalize_quantization import LegalizeQuantizationForCoreAI
from graphopt.backends.interface import Interface, flat_interface
from graphopt.backends.quiet import quiet
from graphopt.extras import require
from graphopt.ir.program import Program, export_graph
from graphopt.passes import IntegersToTables, RemoveUnused
from graphopt.passes.pass_base import Pass
from graphopt.passes.pass_manager import run_passes

__all__ = ["TABLE_TYPES", "legal_export", "legal_passes"]

TABLE_TYPES = ("uint2", "int3", "uint3", "int6", "uint6")


def legal_passes() -> tuple[Pass, ...]:
    """What turns our vocabulary into Core AI's."""
    return (
        IntegersToTables(frozenset(TABLE_TYPES)),
        LegalizeQuantizationForCoreAI(),
        LegalizeForCoreAI(),
    )


def legal_export(program: Program, precision: str) -> ExportedProgram:
    """The program in Core AI's ops, decomposed as coreai-torch wants it.

    Args:
        program: In our vocabulary.
        precision: Float type to compute in.
    """
    with quiet("coreai_torch"):
        coreai_torch = require("coreai_torch", "coreai")
    legal = flat_interface(program, Interface())
    run_passes(legal.graph_module, [RemoveUnused(), *legal_passes()])
    with torch.no_grad():
        exported = export_graph(
            legal.graph_module, legal.example_args, legal.example_kwargs
        ).run_decompositions(coreai_torch.get_decomp_table())
        return cast_to_16_bit_precision(exported) if precision == "float16" else exported
