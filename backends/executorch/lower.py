"""Turn programs into what ExecuTorch converts for XNNPACK and its portable kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphopt.backends.executorch.compress_tables import CompressTables
from graphopt.backends.executorch.constant_operands import (
    ComputeWeights,
    Conv1dAsConv2d,
    OwnNormState,
)
from graphopt.backends.executorch.convolutions_as_linear import ConvolutionsAsLinear
from graphopt.backends.executorch.decompose import decompositions
from graphopt.backends.executorch.legalize import (
    DuplicateDequantize,
    LegalizeForXNNPACK,
)
from graphopt.backends.executorch.options import Tables
from graphopt.backends.executorch.weight_forms import PACKED, is_packed, why_not_integers
from graphopt.backends.interface import Interface, drop_written_inputs, flat_interface
from graphopt.backends.shapes import EXAMPLE_SHAPES, ShapePlan, refuse_fixed
from graphopt.ir.annotations import clear_notes
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.program import Program, export_graph
from graphopt.passes import (
    DequantizeToShiftScale,
    ExpandSparse,
    ExpandTables,
    IntegersToTables,
    RemoveUnused,
    TablesToIntegers,
)
from graphopt.passes.pass_base import Pass
from graphopt.passes.pass_manager import run_passes

__all__ = ["legal_export", "legal_passes"]


def _as_integers(weight: fx.Node, reader: fx.Node) -> bool:
    return not why_not_integers(weight, reader)


_TABLE_PASSES: dict[str, tuple[Pass, ...]] = {
    "auto": (CompressTables(rows_only=True), TablesToIntegers(_as_integers), ExpandTables()),
    "int8": (TablesToIntegers(), ExpandTables()),
    "dense": (ExpandTables(),),
    "compressed": (
        DequantizeToShiftScale(),
        IntegersToTables(PACKED, wanted=is_packed),
        CompressTables(),
        ConvolutionsAsLinear(),
    ),
}


def legal_passes(tables: Tables) -> tuple[Pass, ...]:
    """What turns our vocabulary into ops that XNNPACK takes.

    Args:
        tables: What becomes of lookup tables.
    """
    return (
        ExpandSparse(),
        *_TABLE_PASSES[tables],
        DequantizeToShiftScale(),
        LegalizeForXNNPACK(),
        ComputeWeights(),
        OwnNormState(),
        Conv1dAsConv2d(),
        RemoveUnused(),
        DuplicateDequantize(),
    )


def legal_export(
    program: Program, tables: Tables, kept: Iterable[Any], plan: ShapePlan = EXAMPLE_SHAPES
) -> tuple[ExportedProgram, CapturedModule]:
    """The program as ExecuTorch wants it, exported and as the graph that was.

    Args:
        program: In our vocabulary.
        tables: What becomes of lookup tables.
        kept: Ops that the delegate takes whole.
        plan: Sizes of the inputs.
    """
    legal = flat_interface(program, Interface(scalars=True, keeps_copies=False))
    gm = legal.graph_module
    clear_notes(gm)
    run_passes(gm, [RemoveUnused(), *legal_passes(tables)])
    _own_storage(gm)
    args, kwargs = legal.example_args, legal.example_kwargs
    table, limits = decompositions(kept), plan.limits(legal)
    exported = export_graph(gm, args, kwargs, limits=limits, decompositions=table)
    drop_written_inputs(exported)
    refuse_fixed(exported, plan, "ExecuTorch")
    return exported, gm


def _own_storage(gm: CapturedModule) -> None:
    """Copies of tensors that are views: XNNPACK writes the whole storage behind a constant."""
    for holder in gm.modules():
        for held in (holder._parameters, holder._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                size = tensor.numel() * tensor.element_size()
                if tensor.untyped_storage().nbytes() == size and tensor.is_contiguous():
                    continue
                whole = tensor.detach().clone(memory_format=torch.contiguous_format)
                held[name] = nn.Parameter(whole) if isinstance(tensor, nn.Parameter) else whole  # type: ignore[assignment]
