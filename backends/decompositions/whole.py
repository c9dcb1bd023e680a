"""Rules that call the op they stand for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Around", "plain"]


class Around:
    """A rule of a decomposition table whose calls of its own op stay in the graph.

    Attributes:
        op: What is decomposed.
        rule: Takes the op as a function and the op's arguments; may return NotImplemented, which
            leaves the op as it is.
    """

    def __init__(self, op: Any, rule: Callable[..., Any]) -> None:
        self.op, self.rule = op, rule
        self._inside = threading.local()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the rule gives; NotImplemented for the rule's own calls of the op."""
        if getattr(self._inside, "now", False):
            return NotImplemented
        return self.rule(self._whole, *args, **kwargs)

    def _whole(self, *args: Any, **kwargs: Any) -> Any:
        self._inside.now = True
        try:
            return self.op(*args, **kwargs)
        finally:
            self._inside.now = False


def plain(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule of `Around` that never calls its op."""
    return lambda whole, *args, **kwargs: rule(*args, **kwargs)
