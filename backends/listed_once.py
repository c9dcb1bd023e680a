"""Which ops are composites is asked of torch's dispatcher once in a lowering.

A table of decompositions asks for every library that has registered ops, and each time torch looks up all
composite ops of all of them; converters make several such tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from graphopt.ir import torch_private

__all__ = ["composites_listed_once"]


@contextmanager
def composites_listed_once() -> Iterator[None]:
    """Let tables of decompositions know the composite ops that there are when the first one is made.

    It patches torch for all threads, so it belongs inside `exclusive`.
    """
    utils: Any = torch_private.export_utils
    look_up = utils._materialize_cpp_cia_ops
    known = False

    def once() -> None:
        nonlocal known
        if not known:
            look_up()
            known = True

    utils._materialize_cpp_cia_ops = once
    try:
        yield
    finally:
        utils._materialize_cpp_cia_ops = look_up
