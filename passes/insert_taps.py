"""Watch the gradients at the ops of chosen weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from typing_extensions import override

from graphopt.analysis.matrix_form import weight_uses
from graphopt.analysis.weights import find_weights
from graphopt.fitting.sensitivity import GradientCollector, GradientTap, WeightTap
from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass

__all__ = ["InsertTaps"]

_TAPS = "_taps"


@dataclass(frozen=True)
class InsertTaps(Pass):
    """Put a tap behind every op that reads one of the weights.

    Before:
        %y = linear(%x, %w)
        %z = relu(%y)

    After:
        %y = linear(%x, %w)
        %t = _taps.linear(%x, %y)
        %z = relu(%t)

    A weight that some op reads in a form that cannot be told apart by samples gets one tap behind
    itself.

    Attributes:
        collector: What the taps report to.
        names: Names of the weights.
    """

    name: ClassVar[str] = "insert-taps"
    collector: GradientCollector
    names: Sequence[str]

    @override
    def run(self, edit: Editor) -> None:
        chosen = [weight for weight in find_weights(edit.gm) if weight.name in set(self.names)]
        uses = weight_uses(edit.gm, chosen)
        for weight in chosen:
            if weight.name not in uses:
                tap = WeightTap(self.collector, weight.name)
                path = edit.module(f"{_TAPS}.of_{weight.name.replace('.', '_')}", tap)
                for node in weight.nodes:
                    made = edit.run_module(path, node, place=node.next, like=node)
                    edit.redirect(node, made, lambda _: False)
                continue
            for number, use in enumerate(uses[weight.name]):
                x = use.node.args[use.form.data]
                assert isinstance(x, fx.Node)
                shape = weight.tensor.shape
                inner = GradientTap(self.collector, weight.name, use, shape)
                path = edit.module(f"{_TAPS}.at_{use.node.name}_{number}", inner)
                made = edit.run_module(path, x, use.node, place=use.node.next, like=use.node)
                edit.redirect(use.node, made, lambda _: False)
