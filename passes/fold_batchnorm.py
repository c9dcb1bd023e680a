"""Fold batch norms in evaluation mode into the convolutions before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx
from typing_extensions import override

from graphopt.ir import op_info
from graphopt.ir.annotations import input_points, move_output, output_point
from graphopt.ir.editor import Editor
from graphopt.ir.op_info import WeightSlot
from graphopt.numerics.batchnorm import NormState, fold_norm
from graphopt.passes.pass_base import Pass

__all__ = ["FoldBatchNorm", "conv_state", "is_foldable"]


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

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> captured = graphopt.capture(net, torch.randn(1, 3, 8, 8))
        >>> FoldBatchNorm()(captured.graph_module).modified
        True
    """

    name: ClassVar[str] = "fold-batch-norm"
    tolerance: ClassVar[float | None] = 1e-4

    @override
    def run(self, edit: Editor) -> None:
        for norm in edit.calls(*op_info.targets(lambda info: info.batch_norm)):
            conv = norm.args[0]
            if isinstance(conv, fx.Node) and is_foldable(edit, norm, conv):
                _fold(edit, norm, conv)


def is_foldable(edit: Editor, norm: fx.Node, conv: fx.Node) -> bool:
    """Whether a norm can be folded into the convolution before it."""
    if op_info.is_training(norm):
        return False
    if output_point(conv) is not None or input_points(norm):
        return False  # a rounding stands between them
    info = op_info.info_of(conv)
    if info is None or not info.folds_norm:
        return False
    slot = _slot_of(conv)
    weight, bias = conv.args[slot.position], op_info.argument(conv, slot.bias)
    stored = [weight, *([bias] if bias is not None else [])]
    if any(not isinstance(operand, fx.Node) or operand.op != "get_attr" for operand in stored):
        return False
    if set(conv.users) != {norm}:
        return False
    names = [str(node.target) for node in edit.constants() if set(node.users) - {conv}]
    values = [edit.value(node) for node in edit.constants() if str(node.target) in names]
    mine = [edit.value(operand) for operand in stored if isinstance(operand, fx.Node)]
    return not any(value is other for value in values for other in mine)


def conv_state(edit: Editor, norm: fx.Node, conv: fx.Node) -> tuple[NormState, int | None]:
    """The state of a norm, and the groups of a transposed convolution (None for a plain one)."""
    gamma, beta, mean, variance = (_constant(edit, operand) for operand in norm.args[1:5])
    assert mean is not None
    assert variance is not None
    info = op_info.info_of(conv)
    places = None if info is None else info.convolution
    groups = None
    if places is not None and places.transposed:
        groups = int(op_info.argument(conv, places.groups, 1))
    return (gamma, beta, mean, variance, op_info.eps_of(norm)), groups


def _slot_of(conv: fx.Node) -> WeightSlot:
    info = op_info.info_of(conv)
    assert info is not None
    return info.weights[0]


def _fold(edit: Editor, norm: fx.Node, conv: fx.Node) -> None:
    slot = _slot_of(conv)
    weight, bias = conv.args[slot.position], op_info.argument(conv, slot.bias)
    assert isinstance(weight, fx.Node)
    assert slot.bias is not None
    state, groups = conv_state(edit, norm, conv)
    folded, shift = fold_norm(edit.value(weight).detach(), _constant(edit, bias), state, groups)
    edit.set_value(weight, folded)
    if isinstance(bias, fx.Node):
        edit.set_value(bias, shift)
    else:
        owner = str(weight.target).rpartition(".")[0]
        name = f"{owner}.bias" if owner else "bias"
        made = edit.constant(name, shift, like=weight)
        edit.set_args(conv, (*conv.args[: slot.bias], made, *conv.args[slot.bias + 1 :]))
    info = op_info.info_of(norm)
    assert info is not None
    assert info.batch_norm is not None
    if not info.batch_norm.gives_tuple:
        move_output(norm, conv)
        edit.replace(norm, conv)
        return
    for user in list(norm.users):
        if user.args[1] == 0:
            move_output(user, conv)
            edit.replace(user, conv)
        elif not user.users:
            edit.erase(user)
    if not norm.users:
        edit.erase(norm)


def _constant(edit: Editor, node: object) -> Tensor | None:
    return edit.value(node).detach() if isinstance(node, fx.Node) else None
