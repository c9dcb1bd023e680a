"""Ops in place whose operand nothing else sees become the functional ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.decomposing import never_whole
from graphopt.ir.torch_private import FakeTensor, OpOverload

__all__ = ["make_functional"]


def make_functional(graph: fx.Graph) -> None:
    """Replace `y.add_(x)` by `y = y + x` where y is a value of the graph's own without views.

    What writes into inputs, parameters, buffers or views is left as it is: torch's functionalization
    follows them.

    Args:
        graph: A graph of `torch.export`; it is changed.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    for call in list(graph.nodes):
        functional = _functional_of(call.target) if call.op == "call_function" else None
        operand = call.args[0] if functional is not None and call.args else None
        if isinstance(operand, fx.Node) and _is_own(operand):
            value = _value(functional, call)
            if _is_alike(value, operand.meta.get("val")):
                call.target = functional
                call.meta["val"] = value
                later = {user for user in operand.users if places[user] > places[call]}
                operand.replace_all_uses_with(call, delete_user_cb=later.__contains__)


def _functional_of(op: Any) -> Any:
    """The op that gives what another writes into its first argument, and takes the same."""
    if not isinstance(op, OpOverload):
        return None
    arguments = op._schema.arguments
    written = [place for place, given in enumerate(arguments) if _is_written(given)]
    namespace, _, name = op._schema.name.partition("::")
    if written != [0] or not name.endswith("_") or name.startswith("_"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    other = getattr(packet, op._overloadname, None)
    if not isinstance(other, OpOverload) or other._schema.is_mutable:
        return None
    names = [given.name for given in arguments]
    return other if names == [given.name for given in other._schema.arguments] else None


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _is_own(operand: fx.Node) -> bool:
    """Whether it is a new value, and nothing that reads it is a view of it."""
    if operand.op != "call_function" or not _is_new(operand.target):
        return False
    return all(
        user.op == "output" or _is_new(user.target) or _functional_of(user.target) is not None
        for user in operand.users
    )


def _is_new(op: Any) -> bool:
    """Whether an op's results share no memory with its operands."""
    if not isinstance(op, OpOverload) or never_whole(op):
        return False  # the schema of `reshape` says nothing of views
    return all(result.alias_info is None for result in op._schema.returns)


def _value(functional: Any, call: fx.Node) -> Any:
    """What the functional op gives, of fake tensors; None where these cannot tell."""
    args, kwargs = fx.map_arg((call.args, call.kwargs), lambda node: node.meta.get("val"))
    if not isinstance(args[0], FakeTensor):
        return None
    try:
        with torch.no_grad(), args[0].fake_mode:
            return functional(*args, **kwargs)
    except Exception:  # sizes that depend on data, and what fake tensors cannot do
        return None


def _is_alike(value: Any, operand: Any) -> bool:
    """Whether sizes, strides and type are the operand's, which an op in place keeps."""
    if not isinstance(value, Tensor) or value.dtype is not operand.dtype:
        return False
    known = (*value.shape, *value.stride()), (*operand.shape, *operand.stride())
    return all(_same(*pair) for pair in zip(*known, strict=True))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, int) or isinstance(other, int):
        return isinstance(one, int) and isinstance(other, int) and one == other
    return bool(one.node.expr == other.node.expr)
