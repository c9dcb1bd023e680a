"""The state of a program: buffers and inputs that its graph writes, and what calls make of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.ir.captured_module import CapturedModule, holder_of, set_tensor

__all__ = [
    "StateTensor",
    "carried_state",
    "current_start",
    "held_state",
    "is_state",
    "restored_state",
    "starting_from",
    "state_nodes",
    "state_of",
    "state_tensors",
    "state_values",
    "with_state",
    "writes",
]


@dataclass(frozen=True, eq=False)
class StateTensor:
    """A tensor that a program changes from one call to the next.

    Attributes:
        name: Dotted name of the buffer, or the name of the input.
        shape: Its sizes; 0 stands for one that is open.
        dtype: Its type.
        initial: What it holds before the first call; None for an input, whose caller holds it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    initial: Tensor | None

    @property
    def is_input(self) -> bool:
        """Whether the caller holds it and gives it to every call."""
        return self.initial is None

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        sizes = ", ".join(str(size) if size else "?" for size in self.shape)
        return f"{self.name}: {kind}[{sizes}]{_described(self.initial)}"


def _described(initial: Tensor | None) -> str:
    if initial is None:
        return ", an input that the graph writes"
    if not initial.numel():
        return ""
    first = initial.reshape(-1)[0]
    same = bool((initial == first).all())
    return f", starts as {first.item():g}" if same else ", starts from stored values"


def writes(node: fx.Node) -> bool:
    """Whether a node's op changes a tensor that it reads."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def is_state(node: fx.Node) -> bool:
    """Whether a stored tensor or an input is written by the graph."""
    if node.op not in ("get_attr", "placeholder"):
        return False
    return any(writes(user) and node in _targets(user) for user in node.users)


def state_nodes(gm: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """What writes last to each stored tensor or input that the graph writes: written → writer."""
    written: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if not writes(node):
            continue
        targets = _targets(node)
        for operand in node.all_input_nodes:
            if operand.op in ("get_attr", "placeholder") and operand in targets:
                written[operand] = node
    return written


def state_of(gm: fx.GraphModule) -> list[str]:
    """Names of the stored tensors that the graph writes."""
    names = (str(node.target) for node in state_nodes(gm) if node.op == "get_attr")
    return list(dict.fromkeys(names))


def state_tensors(gm: fx.GraphModule) -> tuple[StateTensor, ...]:
    """The state of a graph: buffers first, then inputs, each in the order in which it is written."""
    made = {name: _tensor(name, value) for name, value in state_values(gm).items()}
    for node in state_nodes(gm):
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            sizes = tuple(size if isinstance(size, int) else 0 for size in value.shape)
            made[str(node.target)] = StateTensor(str(node.target), sizes, value.dtype, None)
    return tuple(made.values())


def _tensor(name: str, value: Tensor) -> StateTensor:
    return StateTensor(name, tuple(value.shape), value.dtype, value.detach())


def state_values(gm: fx.GraphModule) -> dict[str, Tensor]:
    """The stored state as it is now, by name; not copied."""
    return {name: _stored(gm, name) for name in state_of(gm)}


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


# where the next call starts from, other than the initial state; None where it goes on
_START: ContextVar[Mapping[str, Tensor] | None] = ContextVar("start", default={})  # noqa: B039


@contextmanager
def starting_from(state: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Let calls inside `restored_state` start from another state.

    Args:
        state: Name → value; the others are as at the beginning. None goes on from the call before.
    """
    token = _START.set(state)
    try:
        yield
    finally:
        _START.reset(token)


@contextmanager
def restored_state(gm: CapturedModule) -> Iterator[None]:
    """Inside, every call of the module starts from the state as it is now; so does what comes behind.

    The stored tensors themselves are not written, as they may be the user's. `starting_from` says
    for single calls where they start otherwise.
    """
    kept = state_values(gm)
    if not kept:
        yield
        return

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        del module, args, kwargs
        start = _START.get()
        if start is not None:
            with_state(gm, {**kept, **start})

    hook = gm.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with_state(gm, kept)
        yield
    finally:
        hook.remove()
        _put(gm, kept)


@contextmanager
def carried_state(gm: CapturedModule) -> Iterator[None]:
    """Inside, calls of the module go on from each other's state; behind, the state is as it was.

    The stored tensors themselves are not written, as they may be the user's.
    """
    kept = state_values(gm)
    with_state(gm, kept)
    try:
        yield
    finally:
        _put(gm, kept)


def current_start() -> Mapping[str, Tensor]:
    """The state that the call which is being made starts from, as far as `starting_from` says so."""
    return _START.get() or {}


@contextmanager
def held_state(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a module has copies of these values; behind, what it had.

    Args:
        module: It has tensors of these names.
        state: Name → value.
    """
    kept = {name: _stored(module, name) for name in state}
    with_state(module, state)
    try:
        yield
    finally:
        _put(module, kept)


def with_state(gm: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Let a module hold copies of these values as its state."""
    _put(gm, {name: value.detach().clone() for name, value in state.items()})


def _put(gm: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, value in state.items():
        set_tensor(*holder_of(gm, name), value)


def _stored(gm: nn.Module, path: str) -> Tensor:
    holder, name = holder_of(gm, path)
    value = getattr(holder, name)
    assert isinstance(value, torch.Tensor)
    return value
