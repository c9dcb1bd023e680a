"""Let annotated weights be masked in a module that trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from graphopt.analysis.weights import find_weights
from graphopt.ir.annotations import pruning_annotation
from graphopt.ir.editor import Editor
from graphopt.passes.annotate_pruning import AnnotatePruning
from graphopt.passes.pass_base import Pass
from graphopt.prepared import QUANTIZERS, Origin, WeightPruner
from graphopt.prepared.state import is_read_by

__all__ = ["InsertPruners"]


@dataclass(frozen=True)
class InsertPruners(Pass):
    """Insert a `WeightPruner`, which keeps all elements at first, behind every annotated weight.

    Weights that have one stay as they are.

    Before:
        %w = get_attr[fc.weight]
        %y = linear(%x, %w)

    After:
        %w = get_attr[fc.weight]
        %p = _quantizers.of_fc_weight(%w)
        %y = linear(%x, %p)

    Examples:
        >>> from graphopt.passes import AnnotatePruning
        >>> from graphopt.pruning import MagnitudePrunerConfig
        >>> gm = program.graph_module
        >>> _ = AnnotatePruning(MagnitudePrunerConfig())(gm), InsertPruners()(gm)
        >>> [node.target for node in gm.graph.nodes if node.op == "call_module"]
        ['_quantizers.of_0_weight', '_quantizers.of_2_weight']
    """

    name: ClassVar[str] = "insert-pruners"
    after: ClassVar[tuple[type[Pass], ...]] = (AnnotatePruning,)

    @override
    def run(self, edit: Editor) -> None:
        for weight in find_weights(edit.gm):
            annotation = pruning_annotation(weight.nodes[0])
            if annotation is None or is_read_by(edit.gm, weight.nodes, WeightPruner):
                continue
            pruner = WeightPruner(weight.tensor, annotation.spec)
            frames = weight.uses[0].frames
            pruner.origin = Origin(weight.name, frames[-1].name if frames else "", annotation.path)
            path = edit.module(f"{QUANTIZERS}.of_{weight.name.replace('.', '_')}", pruner.eval())
            for node in weight.nodes:
                made = edit.run_module(path, node, place=node.next, like=node)
                edit.redirect(node, made, lambda _: False)
