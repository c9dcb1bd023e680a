"""Let norms and dropouts of an exported graph follow train() and eval() again."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from typing_extensions import override

from graphopt.ir import op_info
from graphopt.ir.annotations import dropout_rate
from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass
from graphopt.prepared import QUANTIZERS, TrainableNorm

__all__ = ["RestoreTraining"]


@dataclass(frozen=True)
class RestoreTraining(Pass):
    """Replace batch norms and dropouts by modules.

    Before:
        %n = _native_batch_norm_legit_no_training(%y, %gamma, %beta, %mean, %var, …)
        %i = getitem(%n, 0)
        %d = clone(%i)                          # was a dropout

    After:
        %i = _quantizers.norm_n(%y, %gamma, %beta, %mean, %var)
        %d = _quantizers.dropout_d(%i)
    """

    name: ClassVar[str] = "restore-training"

    @override
    def run(self, edit: Editor) -> None:
        for norm in edit.calls(op_info.BATCH_NORM):
            momentum, eps = op_info.momentum_of(norm), op_info.eps_of(norm)
            item = next(
                (u for u in norm.users if u.target is operator.getitem and u.args[1] == 0), None
            )
            if item is None:
                continue
            path = edit.module(
                f"{QUANTIZERS}.norm_{norm.name}", TrainableNorm(momentum, eps).eval()
            )
            edit.replace(item, edit.run_module(path, *norm.args[:5], place=norm, like=item))
            for user in list(norm.users):
                edit.erase(user)
            edit.erase(norm)
        for node in list(edit.gm.graph.nodes):
            rate = dropout_rate(node)
            if rate is not None and node.op == "call_function":
                path = edit.module(f"{QUANTIZERS}.dropout_{node.name}", nn.Dropout(rate))
                edit.gm.get_submodule(path).eval()
                edit.replace(node, edit.run_module(path, node.args[0], place=node, like=node))
