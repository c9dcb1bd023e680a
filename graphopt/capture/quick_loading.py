"""Programs of .pt2 files are read with each size parsed once.

While torch rebuilds a graph it parses the sizes of every value with sympy, again for each value that has them,
and looks up the annotations of its schema's classes for each of their instances: more than half of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from graphopt.capture.quick_schema import SchemaReader, quick_unions
from graphopt.exclusive import patched
from graphopt.ir import torch_private

__all__ = ["quick_loading"]


@contextmanager
def quick_loading() -> Iterator[None]:
    """Remember the sizes of a program by how they are written, and how the classes of its schema are read.

    It patches torch for all threads, so it belongs inside `exclusive`.
    """
    module: Any = torch_private.serializing
    reader = module.GraphModuleDeserializer
    with (
        quick_unions(),
        patched(reader, _parse_sym_expr=_once_for_each_program(reader._parse_sym_expr)),
        patched(module, _dict_to_dataclass=SchemaReader()),
    ):
        yield


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
