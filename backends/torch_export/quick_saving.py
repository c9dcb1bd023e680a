"""Programs become .pt2 files without what torch does only to test itself.

Open sizes become text once for each expression, not once for each axis of each value. And torch brings every
program that it saves into a canonical form, a copy of all of it with its nodes sorted and renamed, to throw it
away: a tenth of the time that it takes to compress a transformer of twelve layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from graphopt.capture.quick_schema import quick_unions
from graphopt.exclusive import patched
from graphopt.ir import torch_private

__all__ = ["quick_saving"]


@contextmanager
def quick_saving() -> Iterator[None]:
    """Let torch's serializer write the same bytes with less work.

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

    def as_it_is(program: Any, constants: Any = None) -> Any:
        del constants
        return program

    with quick_unions(), patched(serializing, _print_sympy=once, canonicalize=as_it_is):
        yield
