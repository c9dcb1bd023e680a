"""Open sizes become text once for each expression, not once for each axis of each value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from graphopt.ir import torch_private

__all__ = ["sizes_printed_once"]


@contextmanager
def sizes_printed_once() -> Iterator[None]:
    """Let torch's serializer remember the texts of sizes; they are the same.

    It patches torch for all threads, so it belongs inside `exclusive`.
    """
    serializing: Any = torch_private.serializing
    printed = serializing._print_sympy
    texts: dict[Any, str] = {}

    def once(size: Any) -> str:
        expression = size.node.expr if hasattr(size, "node") else size
        if expression not in texts:
            texts[expression] = printed(size)
        return texts[expression]

    serializing._print_sympy = once
    try:
        yield
    finally:
        serializing._print_sympy = printed
