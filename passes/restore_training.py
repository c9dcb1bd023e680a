"""Let norms and dropouts of an exported graph follow train() and eval() again."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn
from typing_extensions import override

from graphopt.ir import op_info
from graphopt.ir.annotations import dropout_of, noise_of
from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass
from graphopt.prepared import QUANTIZERS, TrainableNorm
from graphopt.prepared.dropout import DropoutInside, TrainableDropout

__all__ = ["RestoreTraining", "norm_momentum"]


@dataclass(frozen=True)
class RestoreTraining(Pass):
    """Replace batch norms and what is random in training by modules, and views by reshapes.

    Before:
        %n = _native_batch_norm_legit_no_training(%y, %gamma, %beta, %mean, %var, …)
        %i = getitem(%n, 0)
        %d = clone(%i)                          # was a dropout
        %a = scaled_dot_product_attention(%q, %k, %v)

    After:
        %i = _quantizers.norm_n(%y, %gamma, %beta, %mean, %var)
        %d = _quantizers.dropout_d(%i)
        %a = _quantizers.dropout_a(%q, %k, %v)

    Examples:
        >>> gm = convolutional.graph_module
        >>> RestoreTraining()(gm).modified
        True
        >>> [node.target for node in gm.graph.nodes if node.op == "call_module"]
        ['_quantizers.norm__native_batch_norm_legit_no_training_default']
    """

    name: ClassVar[str] = "restore-training"

    @override
    def run(self, edit: Editor) -> None:
        edit.relax_views()
        for norm in edit.calls(op_info.BATCH_NORM):
            item = next(
                (u for u in norm.users if u.target is operator.getitem and u.args[1] == 0), None
            )
            if item is None:
                continue
            momentum, tracked = norm_momentum(edit, norm)
            trainable = TrainableNorm(momentum, op_info.eps_of(norm)).eval()
            path = edit.module(f"{QUANTIZERS}.norm_{norm.name}", trainable)
            made = edit.run_module(path, *norm.args[:5], *tracked, place=norm, like=item)
            edit.replace(item, made)
            for user in list(norm.users):
                edit.erase(user)
            edit.erase(norm)
        for node in list(edit.gm.graph.nodes):
            random = None if node.op != "call_function" else _random_in_training(node)
            if random is None:
                continue
            name, module, whole = random
            path = edit.module(f"{QUANTIZERS}.{name}_{node.name}", module.eval())
            args = node.args if whole else node.args[:1]
            kwargs = node.kwargs if whole else {}
            edit.replace(node, edit.run_module(path, *args, place=node, like=node, kwargs=kwargs))


def _random_in_training(node: fx.Node) -> tuple[str, nn.Module, bool] | None:
    """A module that does as a node did in training, its name, and whether it takes all arguments."""
    dropout, noise = dropout_of(node), noise_of(node)
    if dropout is not None:
        rate, kind = dropout
        plain = kind == "dropout"
        return "dropout", nn.Dropout(rate) if plain else TrainableDropout(rate, kind), False
    if noise is not None:
        return "noise", nn.RReLU(*noise), False
    info = op_info.info_of(node)
    if info is None or info.inner_rate is None:
        return None
    rate = float(op_info.argument(node, info.inner_rate) or 0.0)
    if info.weight_list is not None and rate == 0:
        return None
    return "dropout", DropoutInside(str(node.target), rate, info.inner_rate, info.training), True


def norm_momentum(edit: Editor, norm: fx.Node) -> tuple[float | None, list[fx.Node]]:
    """Momentum of a norm, and the number of batches that it has seen, where it counts them.

    Returns:
        None instead of the momentum where the running statistics are the mean over all batches:
        torch.export writes 0 then.
    """
    momentum, mean = op_info.momentum_of(norm), norm.args[3]
    if not isinstance(mean, fx.Node) or mean.op != "get_attr":
        return momentum, []
    owner = str(mean.target).rpartition(".")[0]
    tracked = edit.stored(f"{owner}.{op_info.TRACKED}" if owner else op_info.TRACKED, like=mean)
    if tracked is None:
        return momentum, []
    return None if momentum == 0 else momentum, [tracked]
