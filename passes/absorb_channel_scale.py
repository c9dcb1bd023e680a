"""Give every output channel of a convolution the same spread and let its batch norm undo that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from typing_extensions import override

from graphopt.ir import op_info
from graphopt.ir.editor import Editor
from graphopt.numerics.batchnorm import scale_outputs
from graphopt.passes.fold_batchnorm import conv_state, is_foldable
from graphopt.passes.pass_base import Pass

__all__ = ["AbsorbChannelScale"]


@dataclass(frozen=True)
class AbsorbChannelScale(Pass):
    """Divide each output channel by its root mean square, exactly and without a stored byte.

    Before:
        %y = conv2d(%x, %w, %b)
        %n = _native_batch_norm_legit_no_training(%y, %gamma, %beta, %mean, %var, …, eps)

    After: the same nodes with `w_c/s_c`, `b_c/s_c`, `mean_c/s_c` and `(var_c + eps)/s_c² − eps`.

    One table per tensor then serves channels of one spread, as a per-channel scale would make it,
    which targets store and multiply. Run it before palettizing. Channels are scaled relative to the
    quietest that keeps every variance above zero.

    Examples:
        >>> AbsorbChannelScale()(convolutional.graph_module).modified
        True
    """

    name: ClassVar[str] = "absorb-channel-scale"

    @override
    def run(self, edit: Editor) -> None:
        for norm in edit.calls(op_info.BATCH_NORM):
            conv = norm.args[0]
            if isinstance(conv, fx.Node) and is_foldable(edit, norm, conv) and _is_own(edit, norm):
                _absorb(edit, norm, conv)


def _is_own(edit: Editor, norm: fx.Node) -> bool:
    """Whether no other norm reads the same statistics."""
    mine = [node for node in norm.args[3:5] if isinstance(node, fx.Node)]
    if any(set(node.users) != {norm} for node in mine):
        return False
    values = [edit.value(node) for node in mine]
    others = [edit.value(node) for node in edit.constants() if node not in mine]
    return not any(value is other for value in values for other in others)


def _absorb(edit: Editor, norm: fx.Node, conv: fx.Node) -> None:
    weight, mean, variance = conv.args[1], norm.args[3], norm.args[4]
    bias = conv.args[2] if len(conv.args) > 2 else None
    assert isinstance(weight, fx.Node)
    assert isinstance(mean, fx.Node)
    assert isinstance(variance, fx.Node)
    state, groups = conv_state(edit, norm, conv)
    eps = state[4]
    value = edit.value(weight).detach().double()
    axis = 0 if groups is None else 1
    if axis == 1 and groups != 1:
        return  # channels of a group share rows of the weight
    others = [other for other in range(value.ndim) if other != axis]
    scale = value.square().mean(others).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    wide = state[3].double() + eps
    # the variance must stay at or above zero: s² ≤ (var + eps) / eps
    scale = scale / scale.log().mean().exp()
    scale = torch.minimum(scale, (wide / eps).sqrt()) if eps > 0 else scale
    edit.set_value(weight, scale_outputs(value, 1 / scale, groups).to(edit.value(weight).dtype))
    if isinstance(bias, fx.Node):
        old = edit.value(bias).detach()
        edit.set_value(bias, (old.double() / scale).to(old.dtype))
    edit.set_value(mean, (state[2].double() / scale).to(state[2].dtype))
    shrunk = (wide / scale.square() - eps).clamp_min(0)
    edit.set_value(variance, shrunk.to(state[3].dtype))
