"""Which sizes of its inputs an exported program fixes or bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

__all__ = ["settle_sizes", "size_conditions", "static_dims"]


def settle_sizes(exported: ExportedProgram) -> None:
    """Make numbers of the sizes of inputs that the program's own conditions allow one value for.

    torch.export keeps a symbol for a size that must be 1 where it was told that sizes may be 1.

    Args:
        exported: Sizes of its values change with those of its inputs.
    """
    for node in exported.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None:
                _settle(size)


def _settle(size: torch.SymInt) -> None:
    symbol, env = size.node.expr, size.node.shape_env
    if not symbol.is_Symbol:
        return
    for guard in env.guards:
        sides = guard.expr.args
        if type(guard.expr).__name__ != "Equality" or symbol not in sides:
            continue
        (other,) = set(sides) - {symbol} or {symbol}
        if other.is_Integer:
            env.replacements[symbol] = other
            env._replacements_version_counter += 1
            env._update_version_counter()
            return


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
