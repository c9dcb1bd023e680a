"""Turn programs into what ExecuTorch converts for XNNPACK and its portable kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphopt.backends.capabilities import ComplexNumbers
from graphopt.backends.complex_numbers import in_real_parts
from graphopt.backends.data_sizes import decomposing_for
from graphopt.backends.executorch.compress_tables import DECODED, CompressTables
from graphopt.backends.executorch.constant_operands import (
    ComputeWeights,
    Conv1dAsConv2d,
    OwnNormState,
)
from graphopt.backends.executorch.convolutions_as_linear import ConvolutionsAsLinear
from graphopt.backends.executorch.decompose import decompositions
from graphopt.backends.executorch.dynamic import RowsByRange
from graphopt.backends.executorch.integer_kernels import (
    PACKED,
    QUANTIZE,
    is_packed,
    why_not_integers,
)
from graphopt.backends.executorch.legalize import LegalizeForXNNPACK
from graphopt.backends.executorch.options import Tables
from graphopt.backends.executorch.padding import PadIntegers
from graphopt.backends.executorch.partition import partition_configs
from graphopt.backends.interface import Interface, drop_written_inputs, flat_interface
from graphopt.backends.quiet import silent
from graphopt.backends.shapes import EXAMPLE_SHAPES, ShapePlan, refuse_fixed
from graphopt.extras import require
from graphopt.ir.annotations import clear_notes, notes_of
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program, export_graph
from graphopt.passes import (
    DequantizeToShiftScale,
    ExpandRangeRounding,
    ExpandSparse,
    ExpandTables,
    IntegersToTables,
    RemoveUnused,
    TablesToIntegers,
)
from graphopt.passes.pass_base import Pass
from graphopt.passes.pass_manager import run_passes

__all__ = ["COMPLEX_NUMBERS", "legal_export", "legal_passes"]


COMPLEX_NUMBERS: ComplexNumbers = "transforms"


def _as_integers(weight: fx.Node, reader: fx.Node) -> bool:
    return not why_not_integers(weight, reader)


def _packed(*, tightly: bool, kernels: bool) -> tuple[Pass, ...]:
    """Integers that no kernel computes with, and no byte holds as narrow as they are, as codes."""
    return (
        DequantizeToShiftScale(),
        IntegersToTables(PACKED, partial(is_packed, tightly=tightly, kernels=kernels)),
        CompressTables(),
        ConvolutionsAsLinear(),
    )


def _table_passes(tables: Tables, *, kernels: bool) -> tuple[Pass, ...]:
    rows, integers = CompressTables(rows_only=True), TablesToIntegers(_as_integers)
    match tables:
        case "auto":
            return (rows, integers, ExpandTables(), *_packed(tightly=False, kernels=kernels))
        case "int8":
            return (TablesToIntegers(), ExpandTables())
        case "dense":
            return (ExpandTables(),)
        case "compressed":
            return _packed(tightly=True, kernels=kernels)


def legal_passes(tables: Tables, *, kernels: bool = True) -> tuple[Pass, ...]:
    """What turns our vocabulary into ops that XNNPACK takes.

    Args:
        tables: What becomes of lookup tables.
        kernels: Whether XNNPACK computes, not portable kernels alone.
    """
    return (
        ExpandSparse(),
        RowsByRange(),
        ExpandRangeRounding(),
        *_table_passes(tables, kernels=kernels),
        DequantizeToShiftScale(),
        LegalizeForXNNPACK(),
        ComputeWeights(),
        OwnNormState(),
        Conv1dAsConv2d(),
        *((PadIntegers(),) if kernels else ()),
        RemoveUnused(),
    )


def _explain_decoding(gm: CapturedModule) -> None:
    """Say what would let XNNPACK compute with integers that are decoded beside rounded activations."""
    decoded = [text for text in notes_of(gm) if text.endswith(f"8-bit {DECODED}")]
    if decoded and any(str(node.target) == QUANTIZE for node in gm.graph.nodes):
        Editor(gm).note(
            f"{len(decoded)} weights of 8 bits are decoded, as XNNPACK computes convolutions with integers only"
            ' where their results are rounded as well; compressed with backend="executorch" they are'
        )


def legal_export(
    program: Program, tables: Tables, delegate: str, plan: ShapePlan = EXAMPLE_SHAPES
) -> tuple[ExportedProgram, CapturedModule]:
    """The program as ExecuTorch wants it, exported and as the graph that was.

    Args:
        program: In our vocabulary.
        tables: What becomes of lookup tables.
        delegate: "xnnpack" or "portable".
        plan: Sizes of the inputs.
    """
    real = in_real_parts(program, COMPLEX_NUMBERS)
    legal = flat_interface(real, Interface(scalars=True, keeps_copies=False))
    gm = legal.graph_module
    clear_notes(gm)
    run_passes(gm, [RemoveUnused(), *legal_passes(tables, kernels=delegate == "xnnpack")])
    if delegate == "xnnpack" and tables == "auto":
        _explain_decoding(gm)
    _own_storage(gm)
    args, kwargs = legal.example_args, legal.example_kwargs
    # delegates see the whole graph alone: what stands in the bodies of control flow is run by kernels
    bodies = any(isinstance(module, fx.GraphModule) for module in gm.children())
    kept = [] if bodies else _kept_whole(delegate)
    table, limits = decompositions(kept), plan.limits(legal)
    with decomposing_for("ExecuTorch", gm):
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


def _kept_whole(delegate: str) -> list[Any]:
    """Ops that a delegate takes as they are."""
    with silent():
        require("executorch.exir", "executorch")
        require("executorch.kernels.quantized", "executorch")
        rules = [] if delegate == "portable" else [rule() for rule in partition_configs()]
    return [op for rule in rules if (op := rule.get_original_aten()) is not None]
