"""The table of ops: look-ups, and what users add to it."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import fx

from graphopt.errors import InputError
from graphopt.ir.op_info.activations_table import ACTIVATION_OPS, ARITHMETIC_OPS
from graphopt.ir.op_info.model import OpInfo
from graphopt.ir.op_info.norms_table import NORM_OPS
from graphopt.ir.op_info.views_table import VIEW_OPS
from graphopt.ir.op_info.weights_table import WEIGHT_OPS

__all__ = ["Registration", "argument", "info_of", "known_ops", "named", "register", "targets"]

_TABLE: dict[Any, OpInfo] = {
    target: info
    for info in (*WEIGHT_OPS, *ACTIVATION_OPS, *ARITHMETIC_OPS, *VIEW_OPS, *NORM_OPS)
    for target in info.targets
}


class Registration:
    """What `register` has added; as a context manager it takes that back at the end.

    Examples:
        >>> from graphopt.ir.op_info import OpInfo, info_of, register
        >>> row = register(OpInfo(names=("sinc",), targets=(torch.ops.aten.sinc.default,)))
        >>> isinstance(row, Registration), info_of(torch.ops.aten.sinc.default).names
        (True, ('sinc',))
        >>> row.undo()
        >>> info_of(torch.ops.aten.sinc.default) is None
        True
    """

    def __init__(self, info: OpInfo, before: dict[Any, OpInfo]) -> None:
        self.info = info
        self._before = before

    def undo(self) -> None:
        """Take the rows out of the table again."""
        for target in self.info.targets:
            if _TABLE.get(target) is self.info:
                del _TABLE[target]
        _TABLE.update(self._before)
        self._before = {}

    def __enter__(self) -> OpInfo:
        return self.info

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def register(info: OpInfo, *, replace: bool = False) -> Registration:
    """Make a family of ops known: to captures, compressors, searches and targets alike.

    It holds for this process until it is undone; processes that work for it have to do the same.

    >>> from graphopt.ir.op_info import OpInfo, Scales, WeightSlot
    >>> @torch.library.custom_op("documented::scaled_linear", mutates_args=())
    ... def scaled_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    ...     return torch.nn.functional.linear(x, w) * 0.5
    >>> info = OpInfo(
    ...     names=("scaled_linear",),
    ...     targets=(torch.ops.documented.scaled_linear.default,),
    ...     weights=(WeightSlot(1, channel_axis=0, matrix="linear"),),
    ...     scales=Scales.COMPUTE,
    ... )
    >>> with register(info):
    ...     program = graphopt.compress(model, example)

    Args:
        info: What the ops are.
        replace: Whether it may stand in for what is known of one of its overloads.

    Returns:
        A context manager that undoes the registration; without `with`, it stays.

    Raises:
        InputError: It has no name or no overload, or an overload is known already.
    """
    if not info.names or not info.targets:
        raise InputError("an OpInfo needs at least one name and one overload in `targets`")
    before = {target: _TABLE[target] for target in info.targets if target in _TABLE}
    if before and not replace:
        known = ", ".join(str(target) for target in before)
        raise InputError(f"{known} is known already; pass replace=True to say otherwise of it")
    _TABLE.update(dict.fromkeys(info.targets, info))
    return Registration(info, before)


def info_of(op: fx.Node | Any) -> OpInfo | None:
    """What is known of an op: a node that calls it, or the overload; None where nothing is.

    Examples:
        >>> info_of(torch.ops.aten.conv2d.default).names[0], info_of(torch.ops.aten.sinc.default)
        ('conv2d', None)
    """
    if not isinstance(op, fx.Node):
        return _TABLE.get(op)
    if op.op != "call_function":
        return None
    info = _TABLE.get(op.target)
    return info.by_node(op) if info is not None and info.by_node is not None else info


def known_ops() -> tuple[OpInfo, ...]:
    """All rows of the table.

    Examples:
        >>> any("conv2d" in info.names for info in known_ops())
        True
    """
    return tuple(dict.fromkeys(_TABLE.values()))


def targets(wanted: Callable[[OpInfo], object]) -> tuple[Any, ...]:
    """Overloads of the ops that have a property.

    Examples:
        >>> torch.ops.aten.dropout.default in targets(lambda info: info.dropout)
        True
    """
    return tuple(target for target, info in _TABLE.items() if wanted(info))


def named(*names: str) -> tuple[Any, ...]:
    """Overloads of aten that `names` say, as "conv2d" (all known ones) or "squeeze.dim" (one).

    Examples:
        >>> named("squeeze.dim")
        (<OpOverload(op='aten.squeeze', overload='dim')>,)
    """
    made = []
    for target in _TABLE:
        space, packet, overload = str(target).split(".")
        if space == "aten" and (packet in names or f"{packet}.{overload}" in names):
            made.append(target)
    return tuple(made)


def argument(node: fx.Node, place: int | None, default: Any = None) -> Any:
    """An argument of a node by its place, `default` where it has none there.

    Examples:
        >>> [conv] = convolutional.graph_module.graph.find_nodes(
        ...     op="call_function", target=torch.ops.aten.conv2d.default
        ... )
        >>> argument(conv, 0).name, argument(conv, 6, default=1)
        ('input_1', 1)
    """
    return node.args[place] if place is not None and place < len(node.args) else default
