"""Put taps, which watch gradients, behind the ops of chosen weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from graphopt.analysis.matrix_form import weight_uses
from graphopt.analysis.weights import find_weights
from graphopt.fitting.sensitivity.collector import GradientCollector, GradientTap, WeightTap
from graphopt.ir.editor import Editor

__all__ = ["TAPS", "insert_taps"]

TAPS = "_taps"


def insert_taps(edit: Editor, collector: GradientCollector, names: Sequence[str]) -> None:
    """Put a tap behind every op that reads one of the weights.

    A weight that some op reads in a form that cannot be told apart by samples gets one tap behind
    itself.

    Args:
        edit: The graph.
        collector: What the taps report to.
        names: Names of the weights.
    """
    chosen = [weight for weight in find_weights(edit.gm) if weight.name in set(names)]
    uses = weight_uses(edit.gm, chosen)
    for weight in chosen:
        if weight.name not in uses:
            tap = WeightTap(collector, weight.name)
            path = edit.module(f"{TAPS}.of_{weight.name.replace('.', '_')}", tap)
            for node in weight.nodes:
                made = edit.run_module(path, node, place=node.next, like=node)
                edit.redirect(node, made, lambda _: False)
            continue
        for number, use in enumerate(uses[weight.name]):
            x = use.node.args[use.form.data]
            assert isinstance(x, fx.Node)
            shape = weight.tensor.shape
            inner = GradientTap(collector, weight.name, use, shape)
            path = edit.module(f"{TAPS}.at_{use.node.name}_{number}", inner)
            made = edit.run_module(path, x, use.node, place=use.node.next, like=use.node)
            edit.redirect(use.node, made, lambda _: False)
