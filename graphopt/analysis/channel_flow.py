"""Where the channels of a value lie behind an op that keeps them apart."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from graphopt.ir import op_info
from graphopt.ir.op_info import View

__all__ = ["channel_axis_behind", "extent_of"]


def extent_of(node: fx.Node, axis: int) -> int | None:
    """Size of a value along an axis; None where it is open or there is no such axis."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not -value.ndim <= axis < value.ndim:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def channel_axis_behind(user: fx.Node, node: fx.Node, axis: int) -> int | None:
    """Axis of the channels behind an op that commutes with positive factors of each channel.

    Views, casts, copies, homogeneous activation functions, and pools commute.

    Args:
        user: The op.
        node: What it reads, its first argument.
        axis: Axis of the channels there; may count from the end.

    Returns:
        The axis in the op's result, from the front; None where the op mixes or changes channels.
    """
    info = op_info.info_of(user)
    before, behind = node.meta.get("val"), user.meta.get("val")
    if info is None or not isinstance(before, Tensor) or not isinstance(behind, Tensor):
        return None
    if not user.args or user.args[0] is not node or node in user.args[1:]:
        return None
    axis %= before.ndim
    if info.activation is not None:
        return axis if info.activation.homogeneous else None
    if info.averages and info.pools_over is not None:
        return _behind_mean(user, info.pools_over, before, behind, axis)
    if info.view is not None:
        return _behind_view(user, info.view, before, behind, axis)
    if info.dropout:
        return axis
    if info.averages or info.names[0] == "max_pool":
        return axis if axis < before.ndim - _pooled_axes(user, before) else None
    return None


def _behind_mean(
    user: fx.Node, place: int, before: Tensor, behind: Tensor, axis: int
) -> int | None:
    dims: Any = op_info.argument(user, place)
    gone = {int(dim) % before.ndim for dim in dims or range(before.ndim)}
    if axis in gone:
        return None
    return axis if behind.ndim == before.ndim else axis - sum(dim < axis for dim in gone)


def _pooled_axes(user: fx.Node, before: Tensor) -> int:
    """How many of the last axes a pool goes over: its kernel, or its result, has a size for each."""
    sizes = user.args[1]
    return len(sizes) if isinstance(sizes, list | tuple) else before.ndim


def _behind_view(
    user: fx.Node, view: View, before: Tensor, behind: Tensor, axis: int
) -> int | None:
    if view is View.KEEP:
        return axis if before.shape[axis] == behind.shape[axis] else None
    if view is View.PERMUTE:
        order = [int(place) % before.ndim for place in user.args[1]]  # type: ignore[union-attr, arg-type]
        return order.index(axis)
    if view is View.TRANSPOSE:
        first, second = (int(place) % before.ndim for place in user.args[1:3])  # type: ignore[arg-type]
        return {first: second, second: first}.get(axis, axis)
    if view is View.RESHAPE:
        return _behind_reshape(before, behind, axis)
    return None


def _behind_reshape(before: Tensor, behind: Tensor, axis: int) -> int | None:
    for place in range(behind.ndim):
        if behind.shape[place] != before.shape[axis]:
            continue
        inner = _size(before.shape[axis + 1 :]), _size(behind.shape[place + 1 :])
        outer = _size(before.shape[:axis]), _size(behind.shape[:place])
        if (None not in inner and inner[0] == inner[1]) or (
            None not in outer and outer[0] == outer[1]
        ):
            return place
    return None


def _size(extents: Any) -> int | None:
    """The product of sizes; None where one is open."""
    return math.prod(extents) if all(isinstance(size, int) for size in extents) else None
