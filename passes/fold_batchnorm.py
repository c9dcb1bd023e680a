"""Fold batch norms in evaluation mode into the convolutions before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.ir.annotations import input_points, move_output, output_point
from graphopt.ir.editor import Editor
from graphopt.numerics.batchnorm import NormState, fold_norm
from graphopt.passes.pass_base import Pass

__all__ = ["FoldBatchNorm", "conv_state", "is_foldable"]

_aten = torch.ops.aten
_NORMS = (_aten._native_batch_norm_legit_no_training.default, _aten.batch_norm.default)
_PLAIN = {
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
    *(_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding),
}
# op → position of its `groups`
_TRANSPOSED: dict[Any, int] = {
    _aten.conv_transpose1d.default: 6,
    _aten.conv_transpose2d.input: 6,
    _aten.conv_transpose3d.input: 6,
}


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold each batch norm whose input is a convolution that nothing else reads.

    Before:
        %y = conv2d(%x, %w, None)
        %n = _native_batch_norm_legit_no_training(%y, %gamma, %beta, %mean, %var, …)
        %z = getitem(%n, 0)

    After:
        %z = conv2d(%x, %w', %b')

    Left alone: norms in training mode, norms behind anything else, convolutions whose output or
    weight has other users, and weights that are compressed already.
    """

    name: ClassVar[str] = "fold-batch-norm"
    tolerance: ClassVar[float | None] = 1e-4

    @override
    def run(self, edit: Editor) -> None:
        for norm in edit.calls(*_NORMS):
            conv = norm.args[0]
            if isinstance(conv, fx.Node) and is_foldable(edit, norm, conv):
                _fold(edit, norm, conv)


def is_foldable(edit: Editor, norm: fx.Node, conv: fx.Node) -> bool:
    """Whether a norm can be folded into the convolution before it."""
    if norm.target is _aten.batch_norm.default and norm.args[5]:
        return False
    if output_point(conv) is not None or input_points(norm):
        return False  # a rounding stands between them
    if conv.target not in _PLAIN and conv.target not in _TRANSPOSED:
        return False
    weight = conv.args[1]
    bias = conv.args[2] if len(conv.args) > 2 else None
    stored = [weight, *([bias] if bias is not None else [])]
    if any(not isinstance(each, fx.Node) or each.op != "get_attr" for each in stored):
        return False
    if set(conv.users) != {norm}:
        return False
    names = [str(node.target) for node in edit.constants() if set(node.users) - {conv}]
    values = [edit.value(node) for node in edit.constants() if str(node.target) in names]
    mine = [edit.value(each) for each in stored if isinstance(each, fx.Node)]
    return not any(value is other for value in values for other in mine)


def conv_state(edit: Editor, norm: fx.Node, conv: fx.Node) -> tuple[NormState, int | None]:
    """The state of a norm, and the groups of a transposed convolution (None for a plain one)."""
    gamma, beta, mean, variance = (_constant(edit, each) for each in norm.args[1:5])
    eps = norm.args[6] if norm.target is not _aten.batch_norm.default else norm.args[7]
    assert mean is not None
    assert variance is not None
    groups = None
    if conv.target in _TRANSPOSED:
        position = _TRANSPOSED[conv.target]
        found = conv.args[position] if len(conv.args) > position else 1
        assert isinstance(found, int)
        groups = found
    return (gamma, beta, mean, variance, float(str(eps))), groups


def _fold(edit: Editor, norm: fx.Node, conv: fx.Node) -> None:
    weight, bias = conv.args[1], conv.args[2] if len(conv.args) > 2 else None
    assert isinstance(weight, fx.Node)
    state, groups = conv_state(edit, norm, conv)
    folded, shift = fold_norm(edit.value(weight).detach(), _constant(edit, bias), state, groups)
    edit.set_value(weight, folded)
    if isinstance(bias, fx.Node):
        edit.set_value(bias, shift)
    else:
        owner = str(weight.target).rpartition(".")[0]
        name = f"{owner}.bias" if owner else "bias"
        made = edit.constant(name, shift, like=weight)
        edit.set_args(conv, (*conv.args[:2], made, *conv.args[3:]))
    for user in list(norm.users):
        if norm.target is _aten.batch_norm.default:
            continue
        if user.args[1] == 0:
            move_output(user, conv)
            edit.replace(user, conv)
        elif not user.users:
            edit.erase(user)
    if norm.target is _aten.batch_norm.default:
        move_output(norm, conv)
        edit.replace(norm, conv)
    elif not norm.users:
        edit.erase(norm)


def _constant(edit: Editor, node: object) -> Tensor | None:
    return edit.value(node).detach() if isinstance(node, fx.Node) else None
