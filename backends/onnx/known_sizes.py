"""What a program knows of its open sizes, kept as it is while torch exports."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["sizes_kept"]


@contextlib.contextmanager
def sizes_kept(graph: fx.Graph) -> Iterator[None]:
    """Forget afterwards what is found out about open sizes inside.

    Torch's exporter computes with the program's own symbols: what its kernels ask of the example (a batch
    below 16, before a convolution) would become a bound of the program.

    Args:
        graph: Whose inputs have open sizes.
    """
    held = [(table, table.copy()) for env in _tables(graph) for table in env]
    try:
        yield
    finally:
        for table, before in held:
            table.clear()
            (table.update if isinstance(table, dict) else table.extend)(before)


def _tables(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Ranges, equalities and conditions of the symbols, where there are any."""
    found: dict[int, tuple[Any, ...]] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt):
                env: Any = size.node.shape_env
                found[id(env)] = (env.var_to_range, env.replacements, env.guards)
    return list(found.values())
