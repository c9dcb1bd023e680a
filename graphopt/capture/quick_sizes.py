"""Arithmetic of open sizes is done once.

While a graph with open sizes is traced, torch asks again and again for the same products, sums and comparisons:
the strides and the memory layout of every value. Each answer is a new node, for which torch looks through
both expressions, and through those of what it is made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import NoneType
from typing import Any

from graphopt.exclusive import patched
from graphopt.ir import torch_private

__all__ = ["quick_sizes"]

# whose results follow from the two expressions alone
_METHODS = (
    "add",
    "sub",
    "mul",
    "eq",
    "ne",
    "gt",
    "lt",
    "le",
    "ge",
    "and_",
    "or_",
    "sym_min",
    "sym_max",
)


@contextmanager
def quick_sizes() -> Iterator[None]:
    """Remember what an operation on two open sizes gave, and what an open size is written as.

    It patches torch for all threads, so it belongs inside `exclusive`.
    """
    node: Any = torch_private.SymNode
    names = ["expr", *(f"_{method}" for method in _METHODS)]
    there = {name: vars(node)[name] for name in names if name in vars(node)}
    known: dict[Any, Any] = {}
    quick: dict[str, Any] = {
        name: _expression(original) if name == "expr" else _once(name, original, known)
        for name, original in there.items()
    }
    with patched(node, **quick):
        yield


def _expression(original: Any) -> property:
    """`SymNode.expr`, which torch remembers only for sizes that have been replaced."""

    def expression(self: Any) -> Any:
        if self.shape_env is None:
            return original.fget(self)
        version = self.shape_env._replacements_version_counter
        if version != self._expr_ver or self._expr_cache is None:
            self._expr_cache = original.fget(self)
            self._expr_ver = version
        return self._expr_cache

    return property(expression)


def _once(name: str, original: Callable[..., Any], known: dict[Any, Any]) -> Callable[..., Any]:
    in_a_trace = torch_private.tracing.get_proxy_mode

    def operation(self: Any, other: Any) -> Any:
        if not (_is_plain(self) and _is_plain(other)) or in_a_trace():
            return original(self, other)
        sizes = self.shape_env
        # sizes that have been replaced by others since are written in another way
        key = (
            name,
            id(sizes),
            sizes._replacements_version_counter,
            _described(self),
            _described(other),
        )
        if key not in known:
            known[key] = original(self, other)
        return known[key]

    return operation


def _is_plain(node: Any) -> bool:
    """Whether nothing but an expression and the example's value stands behind it."""
    hint = type(getattr(node, "_hint", node))
    return hint in (int, bool, NoneType) and node.shape_env is not None and not node.fx_node


def _described(node: Any) -> Any:
    return node._expr, node.pytype, node._hint, node._optimized_summation
