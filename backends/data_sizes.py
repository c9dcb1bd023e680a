"""Values whose sizes depend on data."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.errors import LoweringError
from graphopt.ir.module_frames import module_frames

__all__ = ["has_data_size", "place_of", "refuse_data_sizes"]


def refuse_data_sizes(exported: ExportedProgram, target: str) -> None:
    """Say which op it is, where a target could not convert a program for such sizes.

    Args:
        exported: What is to be converted.
        target: The target's name.

    Raises:
        LoweringError: The size of a value depends on data; the first op that gives one is named.
    """
    for node in exported.graph.nodes:
        if node.op == "call_function" and has_data_size(node):
            raise LoweringError(
                f"{target} cannot hold this program:\n{place_of(node)}: the size of its result depends"
                f" on data and has no bound that {target}'s programs could be planned for; use a mask"
                " (torch.where) instead of selecting"
            )


def has_data_size(node: fx.Node) -> bool:
    """Whether a size of a node's value is known only when the program runs."""
    values = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    return any(_from_data(size) for value in values for size in value.shape)


def place_of(node: fx.Node) -> str:
    """The op and the module that called it, for messages."""
    frames = [frame.name for frame in module_frames(node) if frame.name]
    op = str(node.target) if node.op == "call_function" else f"input {node.name}"
    return f"{op} in {frames[-1]}" if frames else op


def _from_data(size: object) -> bool:
    if not isinstance(size, torch.SymInt):
        return False
    symbols = getattr(size.node.expr, "free_symbols", ())
    return any(str(symbol).startswith("u") for symbol in symbols)
