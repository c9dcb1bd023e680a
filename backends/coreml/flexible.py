"""Inputs of Core ML programs whose sizes are ranges or a list of shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from graphopt.backends.shapes import ShapePlan

__all__ = ["input_types"]


def input_types(exported: ExportedProgram, plan: ShapePlan) -> list[Any] | None:
    """What coremltools is to be told of the inputs; None for their sizes in the program.

    Args:
        exported: What is converted.
        plan: Sizes of the inputs.
    """
    if not plan.is_open:
        return None
    import coremltools as ct

    ranges: dict[str, Any] = {}
    names = set(exported.graph_signature.user_inputs)
    made = []
    for node in exported.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if node.name not in names or not isinstance(value, Tensor):
            continue
        if node.name in plan.enumerated:
            shape: Any = ct.EnumeratedShapes(
                [list(shape) for shape in plan.enumerated[node.name]],
                default=list(_example(exported, node.name)),
            )
        else:
            shape = ct.Shape([_size(size, ranges, exported) for size in value.shape])
        made.append(ct.TensorType(name=node.name, shape=shape))
    return made


def _example(exported: ExportedProgram, name: str) -> tuple[int, ...]:
    given = exported.example_inputs[0] if exported.example_inputs else ()
    names = [str(each) for each in exported.graph_signature.user_inputs]
    return tuple(given[names.index(name)].shape)


def _size(size: int | torch.SymInt, ranges: dict[str, Any], exported: ExportedProgram) -> Any:
    import coremltools as ct

    if isinstance(size, int):
        return size
    symbol = str(size.node.expr)
    if symbol not in ranges:
        known = size.node.shape_env.bound_sympy(size.node.expr)
        upper = int(known.upper) if known.upper.is_Integer and int(known.upper) < 2**31 else -1
        lower = max(1, int(known.lower)) if known.lower.is_Integer else 1
        stated = exported.range_constraints.get(size.node.expr)
        if stated is not None and stated.upper.is_Integer and int(stated.upper) < 2**31:
            upper = int(stated.upper)
        hint = int(size.node.hint) if size.node.has_hint() else lower
        # without a name: coremltools holds names until a conversion in the process ends well
        ranges[symbol] = ct.RangeDim(lower_bound=lower, upper_bound=upper, default=hint)
    return ranges[symbol]
