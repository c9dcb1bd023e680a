"""Dimensions of inputs that a captured graph leaves open, and examples of other sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.ir.program import Program

__all__ = ["OpenDim", "open_dims", "resized_example"]


@dataclass(frozen=True)
class OpenDim:
    """A dimension of an input that may have several sizes.

    Attributes:
        input: Name of the graph's input.
        axis: Which dimension.
        symbol: What it is called; dimensions of one symbol have one size. An expression, such as
            "4*s0", where other sizes decide it.
        low: Smallest size that the capture allows.
        high: Largest, None where there is no bound.
        example: Size in the program's example.
    """

    input: str
    axis: int
    symbol: str
    low: int
    high: int | None
    example: int

    @property
    def place(self) -> str:
        """As "x[1]"."""
        return f"{self.input}[{self.axis}]"

    @property
    def is_free(self) -> bool:
        """Whether no other size decides it."""
        return self.symbol.isidentifier()


def open_dims(program: Program) -> list[OpenDim]:
    """The open dimensions of a program's inputs, in their order."""
    dims = []
    for node, leaf in _pairs(program):
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None:
                low, high = _range(size)
                symbol = str(size.node.expr)
                dims.append(OpenDim(str(node.target), axis, symbol, low, high, leaf.shape[axis]))
    return dims


def resized_example(
    program: Program, sizes: Mapping[str, int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The program's example with other sizes: values are repeated or cut.

    Args:
        program: With an example.
        sizes: Symbol → size; other symbols keep that of the example.
    """
    leaves, spec = pytree.tree_flatten((program.example_args, program.example_kwargs))
    known = {dim.symbol: dim.example for dim in open_dims(program) if dim.is_free} | dict(sizes)
    placeholders = list(program.graph_module.graph.find_nodes(op="placeholder"))
    for place, node in enumerate(placeholders):
        value, leaf = node.meta.get("val"), leaves[place]
        if not isinstance(value, Tensor) or not isinstance(leaf, Tensor):
            continue
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                wanted = _size(size, known)
                index = torch.arange(wanted) % leaf.shape[axis]
                leaf = leaf if wanted == leaf.shape[axis] else leaf.index_select(axis, index)
        leaves[place] = leaf
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return tuple(args), dict(kwargs)


def _pairs(program: Program) -> list[tuple[fx.Node, Tensor]]:
    leaves = pytree.tree_leaves((program.example_args, program.example_kwargs))
    nodes = program.graph_module.graph.find_nodes(op="placeholder")
    return [
        (node, leaf)
        for node, leaf in zip(nodes, leaves, strict=False)
        if isinstance(node.meta.get("val"), Tensor) and isinstance(leaf, Tensor)
    ]


def _range(size: torch.SymInt) -> tuple[int, int | None]:
    known = size.node.shape_env.bound_sympy(size.node.expr)
    low = int(known.lower) if known.lower.is_Integer else 1
    high = int(known.upper) if known.upper.is_Integer and int(known.upper) < 2**31 else None
    return low, high


def _size(size: torch.SymInt, known: Mapping[str, int]) -> int:
    expression: Any = size.node.expr
    values = {symbol: known[str(symbol)] for symbol in expression.free_symbols}
    return int(expression.subs(values))
