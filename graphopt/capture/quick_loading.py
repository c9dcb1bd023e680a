"""Programs of .pt2 files are read with each size parsed once.

While torch rebuilds a graph it parses the sizes of every value with sympy, again for each value that has them,
and looks up the annotations of its schema's classes for each of their instances: more than half of the time.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from graphopt.ir import torch_private

__all__ = ["quick_loading"]


@contextmanager
def quick_loading() -> Iterator[None]:
    """Remember the sizes of a program by how they are written, and annotations by their class.

    It patches torch for all threads, so it belongs inside `exclusive`.
    """
    module: Any = torch_private.serializing
    reader, kept_typing = module.GraphModuleDeserializer, module.typing
    parse = reader._parse_sym_expr
    reader._parse_sym_expr = _once_for_each_program(parse)
    module.typing = _Typing()
    try:
        yield
    finally:
        reader._parse_sym_expr, module.typing = parse, kept_typing


def _once_for_each_program(parse: Callable[..., Any]) -> Callable[..., Any]:
    # a program's sizes live in an environment of its own, which is held so that no other takes its id
    known: dict[int, tuple[Any, dict[Any, Any]]] = {}

    def parsed(self: Any, expression: Any, hint: Any = None) -> Any:
        _, own = known.setdefault(id(self.shape_env), (self.shape_env, {}))
        key = (expression, type(expression), hint, type(hint))
        if key not in own:
            own[key] = parse(self, expression, hint)
        return own[key]

    return parsed


class _Typing:
    """`typing`, whose annotations of a class are looked up once."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(typing, name)

    def get_type_hints(self, owner: Any, **options: Any) -> Any:
        if owner not in self._known:
            self._known[owner] = typing.get_type_hints(owner, **options)
        return self._known[owner]
