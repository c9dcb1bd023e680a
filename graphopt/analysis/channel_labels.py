"""Which channel of a weight every element of a value belongs to, as far as its positions are mixed.

Attention mixes positions, not channels: `softmax(q kᵀ) v` is linear in v, so that factors of the
channels of v pass to what the heads put out, through the views that make heads of channels and
channels of heads (Shao et al., OmniQuant, arXiv 2308.13137, scale v for the same reason; Ashkboos
et al., QuaRot, arXiv 2404.00456, rotate it within heads).

Labels are integers that broadcast to the value's shape; an axis along which they do not change has
extent 1. Its own extent may then be open.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir import op_info
from graphopt.ir.editor import operands
from graphopt.ir.op_info import View

__all__ = ["labels_behind", "labels_of"]

_LARGEST = 1 << 22  # labels of one value


def labels_of(channels: int, axis: int, ndim: int) -> Tensor:
    """Labels of a value whose channels lie along one axis."""
    shape = [1] * ndim
    shape[axis] = channels
    return torch.arange(channels).reshape(shape)


def labels_behind(user: fx.Node, node: fx.Node, labels: Tensor) -> Tensor | None:
    """Labels of an op's result, where it commutes with positive factors of each channel.

    Views, splits, casts, homogeneous activation functions, and attention with the value as what it
    averages commute.

    Args:
        user: The op; of one with several results those of the result are found at its `getitem`.
        node: What it reads.
        labels: Labels of that.

    Returns:
        The labels; None where the op does something else with channels.
    """
    if user.target is operator.getitem:
        return _piece(node, user.args[1], labels)
    info = op_info.info_of(user)
    value = node.meta.get("val")
    if info is None or operands(user).count(node) != 1:
        return None
    if info.names[0] == "split":
        return labels
    before, behind = getattr(value, "shape", None), _shape(user)
    if before is None or behind is None:
        return None
    if info.attention == "product":
        return _product(user, node, labels, len(behind))
    if info.attention == "whole":
        return _attention(user, node, labels, len(behind))
    if user.args[0] is not node:
        return None
    if info.dropout or (info.activation is not None and info.activation.homogeneous):
        return labels
    return None if info.view is None else _view(user, info.view, labels, (before, behind))


def _shape(node: fx.Node) -> Sequence[Any] | None:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else None


def _product(user: fx.Node, node: fx.Node, labels: Tensor, ndim: int) -> Tensor | None:
    """Of a product whose sum runs over an axis along which labels are the same."""
    if len(user.args) != 2 or labels.ndim < 2:
        return None
    summed = -2 if user.args[1] is node else -1
    if labels.shape[summed] != 1:
        return None
    return labels.reshape([1] * (ndim - labels.ndim) + list(labels.shape))


def _attention(user: fx.Node, node: fx.Node, labels: Tensor, ndim: int) -> Tensor | None:
    if len(user.args) < 3 or user.args[2] is not node or labels.shape[-2] != 1:
        return None
    labels = labels.reshape([1] * (ndim - labels.ndim) + list(labels.shape))
    if user.kwargs.get("enable_gqa") and labels.shape[-3] > 1:
        asked = _shape(user.args[0]) if isinstance(user.args[0], fx.Node) else None
        heads = None if asked is None else asked[-3]
        if not isinstance(heads, int) or heads % labels.shape[-3]:
            return None
        labels = labels.repeat_interleave(heads // labels.shape[-3], -3)
    return labels


def _piece(node: fx.Node, number: Any, labels: Tensor) -> Tensor | None:
    """Of one result of a split along an axis."""
    info, pieces = op_info.info_of(node), node.meta.get("val")
    if info is None or info.names[0] != "split" or not isinstance(number, int):
        return None
    if not isinstance(pieces, list | tuple):
        return None
    removes = info.view is None  # the axis itself
    place = 1 if removes else 2
    axis: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    if labels.shape[axis] == 1:
        return labels.squeeze(axis) if removes else labels
    if removes:
        return _narrowed(labels.select(axis, number))
    sizes = [piece.shape[axis] for piece in pieces]
    if not all(isinstance(size, int) for size in sizes):
        return None
    start = [0, *accumulate(sizes)][number]
    return _narrowed(labels.narrow(axis, start, sizes[number]))


def _view(
    user: fx.Node, view: View, labels: Tensor, shapes: tuple[Sequence[Any], Sequence[Any]]
) -> Tensor | None:
    given: Any = user.args[1:]
    before, behind = shapes
    match view:
        case View.PERMUTE:
            return labels.permute(given[0])
        case View.TRANSPOSE:
            return labels.transpose(given[0], given[1])
        case View.REVERSE:
            return labels.permute(list(reversed(range(labels.ndim))))
        case View.UNSQUEEZE:
            return labels.unsqueeze(given[0])
        case View.EXPAND:
            return labels.reshape([1] * (len(behind) - labels.ndim) + list(labels.shape))
        case View.SELECT:
            axis, number = given[:2]
            alike = labels.shape[axis] == 1
            return labels.squeeze(axis) if alike else _narrowed(labels.select(axis, number))
        case View.RESHAPE:
            return _reshaped(labels, before, behind)
        case View.KEEP:
            return _kept(user, labels, before, behind)


def _kept(
    user: fx.Node, labels: Tensor, before: Sequence[Any], behind: Sequence[Any]
) -> Tensor | None:
    """Of an op that keeps axes in place, and may cut one."""
    info = op_info.info_of(user)
    if info is None or info.names[0] != "slice":
        return labels if len(before) == len(behind) else None
    given: list[Any] = list(user.args[1:])
    defaults: list[Any] = [0, None, None, 1]
    axis, start, end, step = given + defaults[len(given) :]
    if user.kwargs or not isinstance(axis, int):
        return None
    if labels.shape[axis] == 1:
        return labels
    if not all(end is None or isinstance(end, int) for end in (start, end, step)):
        return None
    places = torch.arange(labels.shape[axis])[slice(start, end, step)]
    return _narrowed(labels.index_select(axis, places))


def _reshaped(labels: Tensor, before: Sequence[Any], behind: Sequence[Any]) -> Tensor | None:
    """Of the same elements in row-major order: axes that make up others go together."""
    wide, made = list(labels.shape), list[int]()
    old, new = len(before), len(behind)
    while old and new:
        i, j = old - 1, new - 1
        while not _same(before[i:old], behind[j:new]):
            sizes = math.prod(_whole(before[i:old])), math.prod(_whole(behind[j:new]))
            if not all(sizes) or (i == 0 and j == 0):
                break
            # the smaller one takes one more axis
            i, j = (i - 1, j) if (sizes[0] < sizes[1] and i) or not j else (i, j - 1)
        alike = all(size == 1 for size in wide[i:old])
        if not _same(before[i:old], behind[j:new]):
            i = j = 0
            alike = all(size == 1 for size in wide[:old])
            if not alike:
                return None
        if alike:
            made = [1] * (new - j) + made
        else:
            wide[i:old] = before[i:old]
            made = list(behind[j:new]) + made
        old, new = i, j
    if any(size != 1 for size in wide[:old]) or math.prod(wide) > _LARGEST:
        return None
    return _narrowed(labels.expand(wide).reshape([1] * new + made))


def _whole(sizes: Sequence[Any]) -> list[int]:
    """Sizes; a 0 where one is open."""
    return [size if isinstance(size, int) else 0 for size in sizes]


def _same(before: Sequence[Any], behind: Sequence[Any]) -> bool:
    """Whether axes hold the same number of elements, as far as that is known."""
    if len(before) == len(behind) == 1:
        return str(before[0]) == str(behind[0])
    sizes = math.prod(_whole(before)), math.prod(_whole(behind))
    return sizes[0] == sizes[1] > 0


def _narrowed(labels: Tensor) -> Tensor:
    """Extent 1 along every axis on which labels are the same."""
    for axis, size in enumerate(labels.shape):
        first = labels.narrow(axis, 0, min(size, 1))
        if size > 1 and bool((labels == first).all()):
            labels = first
    return labels
