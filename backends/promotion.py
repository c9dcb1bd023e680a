"""Operands of the type that an op computes in, for converters that go by other rules than torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from graphopt.ir.torch_private import OpOverload

__all__ = ["promote_operands"]

_aten = torch.ops.aten
# operands that say where a value goes, and are no part of it
_PLACES = ("condition", "mask")
_CASTS = ("aten::_to_copy", "aten::to", "aten::copy")


def promote_operands(exported: ExportedProgram) -> None:
    """Cast whole numbers that an op computes with as floats, before the op.

    Before:
        %y = mul(%n, 9.21)                       # int64, float32

    After:
        %x = _to_copy(%n, dtype=float32)
        %y = mul(%x, 9.21)

    coreai-torch takes a number beside whole ones as float16; coremltools and torch's exporter to ONNX
    have some functions of floats alone.

    Args:
        exported: It is changed.
    """
    changed = False
    for node in list(exported.graph.nodes):
        kind = _computed_in(node)
        if kind is None:
            continue
        for name, operand in _operands(node):
            value = operand.meta.get("val")
            if name in _PLACES or not isinstance(value, Tensor) or _is_float(value.dtype):
                continue
            with exported.graph.inserting_before(node):
                cast = exported.graph.call_function(
                    _aten._to_copy.default, (operand,), {"dtype": kind}
                )
            cast.meta.update(node.meta)
            cast.meta["val"] = value.to(kind)
            node.replace_input_with(operand, cast)
            changed = True
    if changed:
        exported.graph_module.recompile()


def _computed_in(node: fx.Node) -> torch.dtype | None:
    """The float type that an elementwise op computes in; None for others, and in whole numbers."""
    op, value = node.target, node.meta.get("val")
    if not isinstance(op, OpOverload) or torch.Tag.pointwise not in op.tags:
        return None
    if op._schema.name in _CASTS or not isinstance(value, Tensor):
        return None
    if _is_float(value.dtype):
        return value.dtype
    # a comparison with a float, or a quotient that is rounded to a whole number
    floats = any(isinstance(given, float) for given in node.args)
    return torch.get_default_dtype() if floats else None


def _operands(node: fx.Node) -> list[tuple[str, fx.Node]]:
    """Operands with the names that the op has for them."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given: list[tuple[str, Any]] = [*zip(names, node.args, strict=False), *node.kwargs.items()]
    return [(name, each) for name, each in given if isinstance(each, fx.Node)]


def _is_float(kind: torch.dtype) -> bool:
    return kind.is_floating_point or kind.is_complex
