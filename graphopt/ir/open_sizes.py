"""Sizes of inputs that a captured graph leaves open, for exporting it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from graphopt.ir.captured_module import CapturedModule

__all__ = ["Limits", "open_shapes", "raised_ones"]

Limits = Mapping[int, Mapping[int, tuple[int, int | None]]]
_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]


def open_shapes(
    module: CapturedModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    limits: Limits | None = None,
) -> ShapesCollection:
    """Each dimension that the graph leaves open, for `torch.export`.

    Args:
        module: The graph.
        args: Inputs of a call.
        kwargs: Its keyword inputs.
        limits: Position of an input → dimension → smallest and largest size; the other dimensions
            are fixed. None leaves everything open.
    """
    collection = ShapesCollection()
    if limits is not None:
        for position, leaf in enumerate(pytree.tree_leaves((tuple(args), dict(kwargs)))):
            if isinstance(leaf, Tensor) and leaf.ndim:
                own = limits.get(position, {})
                collection[leaf] = {axis: _hint(own.get(axis)) for axis in range(leaf.ndim)}
        return collection
    known = _captured_sizes(module)
    for position, leaf in enumerate(pytree.tree_leaves((tuple(args), dict(kwargs)))):
        if isinstance(leaf, Tensor) and leaf.ndim:
            sizes = known.get(position, (None,) * leaf.ndim)
            collection[leaf] = {
                axis: Dim.STATIC if isinstance(size, int) else Dim.AUTO
                for axis, size in enumerate(sizes)
            }
    return collection


def _hint(bounds: tuple[int, int | None] | None) -> Any:
    if bounds is None:
        return Dim.STATIC
    low, high = bounds
    return Dim.AUTO(min=max(low, 1), max=high)


def raised_ones(
    module: CapturedModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    limits: Limits | None = None,
) -> tuple[_Args, _Kwargs] | None:
    """The example with open sizes of 1 made 2, or None where there is no such size.

    Args:
        module: The graph; it says which sizes are open, and which are one and the same.
        args: Inputs of a call.
        kwargs: Its keyword inputs.
        limits: As for `open_shapes`.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    raised = False
    for position, sizes in _captured_sizes(module).items():
        leaf = leaves[position] if position < len(leaves) else None
        if not isinstance(leaf, Tensor) or leaf.ndim != len(sizes):
            return None
        for axis, size in enumerate(sizes):
            if limits is not None and axis not in limits.get(position, {}):
                continue
            if not isinstance(size, int) and leaf.shape[axis] == 1:
                if not size.node.expr.is_Symbol:
                    return None
                leaf = torch.cat([leaf, leaf], axis)
                raised = True
        leaves[position] = leaf
    return pytree.tree_unflatten(leaves, spec) if raised else None


def _captured_sizes(module: CapturedModule) -> dict[int, tuple[Any, ...]]:
    """Sizes by the position of an input: integers, or symbols where they are open."""
    sizes = {}
    for position, node in enumerate(module.graph.find_nodes(op="placeholder")):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            sizes[position] = tuple(value.shape)
    return sizes
