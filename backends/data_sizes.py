"""Values whose sizes depend on data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.errors import GraphOptError, LoweringError
from graphopt.ir.module_frames import module_frames

__all__ = ["decomposing_for", "makes_data_size", "place_of", "refuse_data_sizes"]


@contextmanager
def decomposing_for(target: str, gm: fx.GraphModule) -> Iterator[None]:
    """Errors of torch, which exports and decomposes a program for a target, as ours.

    Args:
        target: The target's name.
        gm: What is exported.

    Raises:
        LoweringError: torch cannot; the op is named whose value's size depends on data, if there is one.
    """
    try:
        yield
    except GraphOptError:
        raise
    except Exception as error:
        refuse_data_sizes(gm, target)
        said = " ".join(str(error).split())
        raise LoweringError(
            f"torch cannot decompose the program for {target}: {type(error).__name__}: {said}"
        ) from error


def refuse_data_sizes(exported: ExportedProgram | fx.GraphModule, target: str) -> None:
    """Say which op it is, where a target could not convert a program for such sizes.

    Args:
        exported: What is to be converted.
        target: The target's name.

    Raises:
        LoweringError: The size of a value depends on data; the first op that gives one is named.
    """
    for node in exported.graph.nodes:
        if node.op == "call_function" and _has_data_size(node):
            raise LoweringError(
                f"{target} cannot hold this program:\n{place_of(node)}: the size of its result depends"
                f" on data and has no bound that {target}'s programs could be planned for; use a mask"
                " (torch.where) instead of selecting"
            )


def makes_data_size(node: fx.Node) -> bool:
    """Whether a size of a node's value depends on data, and none of what it is given does."""
    return _has_data_size(node) and not any(map(_has_data_size, node.all_input_nodes))


def _has_data_size(node: fx.Node) -> bool:
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
