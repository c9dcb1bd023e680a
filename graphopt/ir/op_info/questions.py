"""Questions about a node that the table of ops answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir.op_info.model import View
from graphopt.ir.op_info.norms_table import BATCH_NORM
from graphopt.ir.op_info.registry import argument, info_of

__all__ = [
    "cast_type",
    "eps_of",
    "is_batch_norm",
    "is_cast",
    "is_training",
    "momentum_of",
    "noise_range",
    "op_names",
    "takes_sizes_alone",
    "view_of",
    "zeros_added",
]

# of the sizes of their operand, whatever its values are
_OF_SIZES = frozenset(
    f"aten::{name}"
    for name in (
        *("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"),
        *("sym_size", "size", "sym_numel"),
    )
)
_TURNING = (View.REVERSE, View.TRANSPOSE, View.PERMUTE)


def zeros_added(node: fx.Node) -> list[int] | None:
    """By how much a node pads with zeros, last axis first; None where it does something else.

    >>> net = torch.nn.ZeroPad2d((0, 1, 0, 1))
    >>> graph = graphopt.capture(net, torch.ones(1, 3, 4, 4)).graph_module.graph
    >>> [zeros_added(node) for node in graph.nodes if node.op == "call_function"]
    [[0, 1, 0, 1]]
    """
    info = info_of(node)
    if info is None or info.fill is None or argument(node, info.fill) not in (0, None):
        return None
    added: Any = node.args[1]
    fits = isinstance(added, list | tuple) and all(isinstance(each, int) for each in added)
    return list(added) if fits else None


def view_of(node: object) -> View | None:
    """What a node does with axes, where it only rearranges its operand.

    Examples:
        >>> gm = torch.fx.symbolic_trace(lambda x: torch.ops.aten.transpose.int(x, 0, 1))
        >>> [str(view_of(node)) for node in gm.graph.nodes if node.op == "call_function"]
        ['View.TRANSPOSE']
    """
    info = info_of(node) if isinstance(node, fx.Node) else None
    return None if info is None else info.view


def takes_sizes_alone(node: fx.Node) -> bool:
    """Whether a node's result does not depend on the values of its operand.

    Examples:
        >>> gm = torch.fx.symbolic_trace(lambda x: torch.ops.aten.ones_like.default(x))
        >>> [takes_sizes_alone(node) for node in gm.graph.nodes if node.op == "call_function"]
        [True]
    """
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name in _OF_SIZES


def is_batch_norm(node: object) -> bool:
    """Whether a node is a batch norm that uses its stored statistics, as captures hold them.

    Examples:
        >>> [node.name for node in convolutional.graph_module.graph.nodes if is_batch_norm(node)]
        ['_native_batch_norm_legit_no_training_default']
    """
    return isinstance(node, fx.Node) and node.target is BATCH_NORM


def is_cast(node: fx.Node) -> bool:
    """Whether a node only changes the type of its operand.

    Examples:
        >>> to_copy = torch.ops.aten._to_copy.default
        >>> gm = torch.fx.symbolic_trace(lambda x: to_copy(x, dtype=torch.float16))
        >>> [is_cast(node) for node in gm.graph.nodes if node.op == "call_function"]
        [True]
    """
    info = info_of(node)
    return info is not None and info.cast


def cast_type(node: fx.Node) -> torch.dtype | None:
    """The type that a node only casts its operand to; None where it names none.

    Examples:
        >>> to_copy = torch.ops.aten._to_copy.default
        >>> gm = torch.fx.symbolic_trace(lambda x: to_copy(x, dtype=torch.float16))
        >>> [cast] = gm.graph.find_nodes(op="call_function", target=to_copy)
        >>> cast_type(cast)
        torch.float16
    """
    if not is_cast(node):
        return None
    given = (*node.args[1:], node.kwargs.get("dtype"))
    return next((value for value in given if isinstance(value, torch.dtype)), None)


def is_training(node: fx.Node) -> bool:
    """Whether a norm or a dropout is switched to training.

    Examples:
        >>> gm = torch.fx.symbolic_trace(lambda x: torch.ops.aten.dropout.default(x, 0.5, True))
        >>> [is_training(node) for node in gm.graph.nodes if node.op == "call_function"]
        [True]
    """
    info = info_of(node)
    return info is not None and bool(argument(node, info.training))


def noise_range(node: fx.Node) -> tuple[float, float]:
    """Between which values an op of random slope draws it in training.

    Examples:
        >>> gm = torch.fx.symbolic_trace(lambda x: torch.ops.aten.rrelu.default(x, 0.1, 0.3))
        >>> [noise_range(node) for node in gm.graph.nodes if node.op == "call_function"]
        [(0.1, 0.3)]
    """
    low, high = (argument(node, place) for place in (1, 2))
    defaults = [each.default_value for each in node.target._schema.arguments[1:3]]  # type: ignore[union-attr]
    return float(defaults[0] if low is None else low), float(defaults[1] if high is None else high)


def eps_of(norm: fx.Node) -> float:
    """A batch norm's ε.

    Examples:
        >>> from graphopt.ir.op_info import BATCH_NORM
        >>> graph = convolutional.graph_module.graph
        >>> [norm] = graph.find_nodes(op="call_function", target=BATCH_NORM)
        >>> eps_of(norm)
        1e-05
    """
    info = info_of(norm)
    assert info is not None
    assert info.batch_norm is not None
    return float(str(norm.args[info.batch_norm.eps]))


def momentum_of(norm: fx.Node) -> float:
    """A batch norm's momentum.

    Examples:
        >>> from graphopt.ir.op_info import BATCH_NORM
        >>> graph = convolutional.graph_module.graph
        >>> [norm] = graph.find_nodes(op="call_function", target=BATCH_NORM)
        >>> momentum_of(norm)
        0.1
    """
    info = info_of(norm)
    assert info is not None
    assert info.batch_norm is not None
    return float(str(norm.args[info.batch_norm.momentum]))


def op_names(node: fx.Node) -> tuple[str, ...]:
    """What configs call an op: its family, the op itself, and its overload.

    Examples:
        >>> calls = program.graph_module.graph.find_nodes(
        ...     op="call_function", target=torch.ops.aten.linear.default
        ... )
        >>> op_names(calls[0])
        ('linear', 'aten.linear.default')
    """
    info = info_of(node)
    full = str(node.target)
    packet = full.split(".")[1] if "." in full else full
    names: tuple[Any, ...] = () if info is None else info.names
    if _is_linear(node):
        # what decompositions make of a linear layer
        names = ("linear", *names)
    return tuple(dict.fromkeys((*names, packet, full)))


def _is_linear(node: fx.Node) -> bool:
    info = info_of(node)
    return info is not None and info.linear_if_turned and view_of(node.args[-1]) in _TURNING
