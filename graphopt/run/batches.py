"""Inputs of one call of a captured graph: as they are given, and as its placeholders take them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.utils import _pytree as pytree

from graphopt.errors import InputError
from graphopt.ir.captured_module import CapturedModule, InputGuards

__all__ = ["Batch", "as_batch", "as_captured", "explained", "flat_inputs"]

Batch = tuple[tuple[Any, ...], dict[str, Any]]


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
