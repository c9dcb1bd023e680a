"""Ops inside of a region keep the module and the line of code that they come from.

What runs inside of `torch.autocast` or `torch.no_grad` is a graph of its own in an exported program. Where torch
makes one graph of both, it says of all of its ops that they come from where the region is, so that configs by
module or type of module would not find a layer in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx

from graphopt.exclusive import patched

__all__ = ["regions_by_op"]

_REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")


@contextmanager
def regions_by_op() -> Iterator[None]:
    """Let torch run the graphs of regions op by op, each with its own origin.

    It patches torch for all threads, so it belongs inside `exclusive`.
    """
    kinds = {type(getattr(torch.ops.higher_order, name)) for name in _REGIONS}
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(patched(kind, __call__=_by_op(kind.__call__)))
        yield


def _by_op(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        bodies = (
            fx.Interpreter(each).run if isinstance(each, fx.GraphModule) else each for each in args
        )
        return call(self, *bodies, **kwargs)

    return called
