"""Views and casts of a weight without the graph that they stand in, so that other processes can follow them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.ir import op_info
from graphopt.ir.torch_private import OpOverload

__all__ = ["ViewStep"]


@dataclass(frozen=True)
class ViewStep:
    """One view or cast.

    Attributes:
        target: What is called.
        rest: Its arguments behind the tensor.
        options: Its keyword arguments.
        is_cast: Whether it changes the type alone.
    """

    target: Callable[..., Any]
    rest: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    is_cast: bool = False

    @classmethod
    def of(cls, node: fx.Node) -> ViewStep:
        """The step of a node."""
        assert callable(node.target)
        rest = tuple(option for option in node.args[1:] if not isinstance(option, fx.Node))
        return cls(node.target, rest, dict(node.kwargs), op_info.is_cast(node))

    def __call__(self, value: Any) -> Any:
        """What it makes of a value."""
        return self.target(value, *self.rest, **self.options)

    def __reduce__(self) -> tuple[Any, ...]:
        # torch's own ops cannot be pickled
        target = self.target
        named = str(target) if isinstance(target, OpOverload) else target
        return _step, (named, self.rest, dict(self.options), self.is_cast)


def _step(
    target: str | Callable[..., Any],
    rest: tuple[Any, ...],
    options: Mapping[str, Any],
    is_cast: bool,
) -> ViewStep:
    if not isinstance(target, str):
        return ViewStep(target, rest, options, is_cast)
    namespace, packet, overload = target.split(".")
    op = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    return ViewStep(op, rest, options, is_cast)
