"""Turn programs into models of onnx_ir, through torch's exporter."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.backends.capabilities import ComplexNumbers
from graphopt.backends.complex_numbers import in_real_parts
from graphopt.backends.float_types import as_float32
from graphopt.backends.interface import (
    Interface,
    drop_written_inputs,
    flat_interface,
    output_names,
)
from graphopt.backends.onnx.decompose import decompositions
from graphopt.backends.onnx.expand import expand
from graphopt.backends.onnx.float_results import add_biases_behind
from graphopt.backends.onnx.known_sizes import sizes_kept
from graphopt.backends.onnx.matmul_nbits import integers_of_tables
from graphopt.backends.onnx.norms import in_one_type
from graphopt.backends.onnx.options import ONNXOptions
from graphopt.backends.onnx.registry import OPSET, read_once
from graphopt.backends.onnx.rotations import repeat_angles
from graphopt.backends.onnx.state import add_state, outputs_of_state
from graphopt.backends.onnx.turned_batches import turn_results
from graphopt.backends.promotion import promote_operands
from graphopt.backends.quiet import quiet
from graphopt.backends.shapes import EXAMPLE_SHAPES, ShapePlan, refuse_fixed
from graphopt.errors import LoweringError
from graphopt.extras import require
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

__all__ = ["COMPLEX_NUMBERS", "LACKS", "TABLE_TYPES", "legal_passes", "to_model"]

_log = logging.getLogger(__name__)
_INTERFACE = Interface(scalars=True)
LACKS = frozenset({torch.float64, torch.bfloat16})
COMPLEX_NUMBERS: ComplexNumbers = "transforms"
TABLE_TYPES = tuple(f"{sign}int{bits}" for bits in (2, 3, 5, 6, 7) for sign in ("", "u"))


def legal_passes() -> tuple[Pass, ...]:
    """What turns our vocabulary into forms that nodes of the standard hold."""
    return (
        ExpandRangeRounding(),
        DequantizeToShiftScale(),
        IntegersToTables(frozenset(TABLE_TYPES)),
        WidenScales(floats=True, bfloat16=True, dtype=torch.float32),
    )


def to_model(program: Program, options: ONNXOptions, plan: ShapePlan = EXAMPLE_SHAPES) -> Any:
    """The program as a model of onnx_ir.

    Args:
        program: In our vocabulary.
        options: Of `lower`.
        plan: Sizes that must stay open; what `options.dynamic` leaves open may not.

    Raises:
        LoweringError: torch's exporter cannot convert it.
    """
    require("onnx", "onnx")
    require("onnxscript", "onnx")
    legal = as_float32(flat_interface(in_real_parts(program, COMPLEX_NUMBERS), _INTERFACE), LACKS)
    gm = legal.graph_module
    tables = [integers_of_tables(gm)] if options.matmul == "nbits" else []
    run_passes(gm, [RemoveUnused(), *tables, *legal_passes(), RemoveUnused()])
    if options.dynamic:
        try:
            return _converted(program, legal, options)
        except LoweringError as error:
            model = _converted(program, legal, replace(options, dynamic=False))
            _log.warning(
                "ONNX: sizes are those of the example, as open ones cannot be converted: %s",
                str(error).splitlines()[-1],
            )
            return model
    return _converted(program, legal, options, plan)


def _converted(
    program: Program, legal: Program, options: ONNXOptions, plan: ShapePlan = EXAMPLE_SHAPES
) -> Any:
    names = [
        str(node.target)
        for node, leaf in zip(
            legal.graph_module.graph.find_nodes(op="placeholder"),
            pytree.tree_leaves((legal.example_args, legal.example_kwargs)),
            strict=True,
        )
        if isinstance(leaf, Tensor)
    ]
    try:
        with (
            torch.no_grad(),
            quiet("torch.onnx"),
            quiet("onnx_ir"),
            quiet("onnxscript"),
            read_once(),
            sizes_kept(legal.graph_module.graph),
        ):
            exported = export_graph(
                legal.graph_module,
                legal.example_args,
                legal.example_kwargs,
                dynamic=options.dynamic or plan.is_open,
                decompositions=decompositions(legal.graph_module),
            )
            promote_operands(exported)
            refuse_fixed(exported, plan, "ONNX")
            drop_written_inputs(exported)
            state = outputs_of_state(exported)
            made: Any = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                input_names=names,
                output_names=output_names(program),
                verbose=False,
            )
            add_state(made.model, state)
            made.optimize()
            repeat_angles(made.model)
            in_one_type(made.model)
            expand(made.model, options)
            add_biases_behind(made.model)
            turn_results(made.model)
    except LoweringError:
        raise
    except Exception as error:
        raise LoweringError(
            f"torch's exporter to ONNX cannot convert it: {_cause(error)}"
        ) from error
    _strip(made.model)
    return made.model


def _cause(error: BaseException) -> str:
    """The innermost message of an error, and the op that it came from."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    while error.__cause__ is not None:
        error = error.__cause__
    inner = " ".join(str(error).split())[:400]
    return f"{type(error).__name__}: {inner}" if inner else said


def _strip(model: Any) -> None:
    """Drop what torch notes of every node: stack traces, scopes, names of another graph."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for graph in model.graphs():
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
