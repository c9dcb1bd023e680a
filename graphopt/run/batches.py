"""Inputs of one call of a captured graph: as they are given, and as its placeholders take them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.errors import InputError
from graphopt.ir.captured_module import CapturedModule, InputGuards
from graphopt.ir.state import held_state, starting_from

__all__ = [
    "Batch",
    "CallSequence",
    "StatefulCall",
    "as_batch",
    "as_captured",
    "explained",
    "flat_inputs",
    "run_call",
]

Batch = tuple[tuple[Any, ...], dict[str, Any]]


class CallSequence:
    """Calls of which each goes on from the state that the one before left.

    It stands where data have one call: `[CallSequence([prompt, token, token]), …]`. What a model
    keeps from call to call (a cache, a hidden state, a counter) is at its initial value before the
    first of them.

    Args:
        calls: Inputs of each: a tensor, a tuple or list of positional ones, or a dict of keyword
            ones.

    Raises:
        InputError: There is none.

    Examples:
        >>> sequence = CallSequence([example, example])  # the second goes on from the state of the first
        >>> len(sequence)
        2
    """

    def __init__(self, calls: Iterable[Any]) -> None:
        self.calls = tuple(calls)
        if not self.calls:
            raise InputError("a sequence of calls must hold at least one")

    def __len__(self) -> int:
        return len(self.calls)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.calls)

    def __repr__(self) -> str:
        return f"CallSequence({len(self.calls)} calls)"


class StatefulCall(tuple[Any, ...]):
    """A call of a sequence, with the state that it starts from.

    It is a `Batch`, so that whatever runs calls in any order can take it.

    Args:
        batch: Inputs.
        state: Name of a stored tensor → its value before the call; None where the call goes on from
            the one before, which has just been made.
    """

    state: Mapping[str, Tensor] | None

    def __new__(cls, batch: Batch, state: Mapping[str, Tensor] | None) -> Self:
        """See the class."""
        made = super().__new__(cls, batch)
        made.state = state
        return made


def _flat_call(call: StatefulCall) -> tuple[list[Any], Mapping[str, Tensor] | None]:
    return [call[0], call[1]], call.state


def _whole_call(parts: Iterable[Any], state: Mapping[str, Tensor] | None) -> StatefulCall:
    args, kwargs = parts
    return StatefulCall((args, kwargs), state)


pytree.register_pytree_node(StatefulCall, _flat_call, _whole_call)


def run_call(module: nn.Module, batch: Batch) -> Any:
    """What a module gives for a call, from the state that the call starts from.

    Where the call knows its state, the module's own is afterwards as it was before.
    """
    if not isinstance(batch, StatefulCall):
        return module(*batch[0], **batch[1])
    with held_state(module, batch.state or {}), starting_from(batch.state):
        return module(*batch[0], **batch[1])


def as_batch(inputs: Any) -> Batch:
    """Inputs of one call: a tensor, a tuple or list of positional ones, or a dict of keyword ones."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def flat_inputs(gm: CapturedModule, batch: Batch) -> list[Any]:
    """The values of the graph's placeholders for one call.

    Raises:
        InputError: The structure differs from the captured one.
    """
    try:
        given = inspect.signature(gm.forward).bind(*batch[0], **batch[1]).arguments
    except TypeError as error:
        raise InputError(f"inputs do not fit the captured call: {error}") from None
    info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]
    positional, keyword = info.in_spec.children()
    names, count = info.orig_args, positional.num_children
    by_name = {name: given[name] for name in keyword.context}
    leaves, spec = pytree.tree_flatten((tuple(given[name] for name in names[:count]), by_name))
    if spec != info.in_spec:
        raise InputError(f"inputs do not fit the captured call: {spec}, captured {info.in_spec}")
    return leaves


def as_captured(gm: CapturedModule, batch: Batch) -> Batch:
    """Inputs of one call by position and by name as in the call that was captured.

    Raises:
        InputError: The structure differs from the captured one.
    """
    spec = gm.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
    args, kwargs = pytree.tree_unflatten(flat_inputs(gm, batch), spec)
    return tuple(args), dict(kwargs)


@contextmanager
def explained(gm: CapturedModule, batch: Batch) -> Iterator[None]:
    """Say of inputs with which an op fails that the graph was captured for other sizes, if it was.

    Raises:
        InputError: In the place of the op's own error.
    """
    try:
        yield
    except RuntimeError:
        for guard in gm._forward_pre_hooks.values():
            if isinstance(guard, InputGuards):
                guard(gm, *batch)
        raise
