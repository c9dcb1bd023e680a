"""Which sizes of its inputs an exported program fixes or bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

__all__ = ["size_conditions", "static_dims"]


def size_conditions(exported: ExportedProgram, places: Sequence[str]) -> Iterator[str]:
    """Sizes and ranges that the program fixes for its tensor inputs, as guard conditions.

    Args:
        exported: The program.
        places: Where a call has its inputs, in the order of the program's (`ir.guards`).
    """
    specs = exported.graph_signature.input_specs
    names = {spec.arg.name for spec in specs if spec.kind == InputKind.USER_INPUT}
    inputs = [node for node in exported.graph.find_nodes(op="placeholder") if node.name in names]
    for node, whole in zip(inputs, places, strict=False):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        for axis, size in enumerate(value.shape):
            place = f"{whole}.size()[{axis}]"
            fixed = size if isinstance(size, int) else _only_value(exported, size)
            if fixed is not None:
                yield f"{place} == {fixed}"
                continue
            known = exported.range_constraints.get(size.node.expr)
            if known is None:
                continue
            # torch.export's own lower bound of 2 only says that it did not specialise on 0 and 1
            if known.lower.is_Integer and known.lower > 2:
                yield f"{place} >= {int(known.lower)}"
            if known.upper.is_Integer:
                yield f"{place} <= {int(known.upper)}"


def static_dims(exported: ExportedProgram, names: Sequence[str]) -> Iterator[str]:
    """Input dimensions that the program fixes, as "x[1] = 3".

    Args:
        exported: The program.
        names: Names of its inputs.
    """
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in names and isinstance(value, Tensor):
            for axis, size in enumerate(value.shape):
                fixed = size if isinstance(size, int) else _only_value(exported, size)
                if fixed is not None:
                    yield f"{node.name}[{axis}] = {fixed}"


def _only_value(exported: ExportedProgram, size: torch.SymInt) -> int | None:
    """The one value that a symbolic size may take, if there is only one."""
    constant = size.node.maybe_as_int()
    if constant is not None:
        return int(constant)
    known = exported.range_constraints.get(size.node.expr)
    if known is not None and known.lower == known.upper:
        return int(known.lower)
    return None
