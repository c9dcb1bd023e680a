"""The state of a program: buffers that its graph writes, kept as they are while data run through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.ir.captured_module import CapturedModule, holder_of, set_tensor

__all__ = ["restored_state", "state_of", "writes"]


def writes(node: fx.Node) -> bool:
    """Whether a node's op changes a tensor that it reads."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def state_of(gm: fx.GraphModule) -> list[str]:
    """Names of the stored tensors that the graph writes."""
    written = (
        operand
        for node in gm.graph.nodes
        if writes(node)
        for operand in node.all_input_nodes
        if operand.op == "get_attr" and operand in _targets(node)
    )
    return list(dict.fromkeys(str(node.target) for node in written))


def _targets(node: fx.Node) -> list[Any]:
    """What a writing op changes, by its schema."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    changed = []
    for number, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        by_position = node.args[number] if number < len(node.args) else None
        changed.append(node.kwargs.get(argument.name, by_position))
    return changed


@contextmanager
def restored_state(gm: CapturedModule) -> Iterator[None]:
    """Inside, every call of the module starts from the state as it is now; so does what comes behind.

    The stored tensors themselves are not written, as they may be the user's.
    """
    names = state_of(gm)
    if not names:
        yield
        return
    kept = {name: _stored(gm, name) for name in names}

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        del module, args, kwargs
        for name, value in kept.items():
            set_tensor(*holder_of(gm, name), value.detach().clone())

    hook = gm.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        for name, value in kept.items():
            set_tensor(*holder_of(gm, name), value)


def _stored(gm: nn.Module, path: str) -> Tensor:
    holder, name = holder_of(gm, path)
    value = getattr(holder, name)
    assert isinstance(value, torch.Tensor)
    return value
