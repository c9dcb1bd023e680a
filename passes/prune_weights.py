"""Replace annotated weights by their values and a mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, fx
from typing_extensions import override

from graphopt.analysis.weights import find_weights
from graphopt.errors import CompressionError
from graphopt.ir.annotations import pruning_annotation
from graphopt.ir.editor import Editor
from graphopt.passes.annotate_pruning import AnnotatePruning
from graphopt.passes.pass_base import Pass
from graphopt.prepared.findings import findings_of, keep_findings
from graphopt.schemes.prune import mask_of, prune
from graphopt.schemes.rewrite import replace_weight

__all__ = ["PruneWeights", "annotated_masks"]


def annotated_masks(gm: fx.GraphModule) -> dict[str, Tensor]:
    """Name of each annotated weight → where its elements stay.

    Raises:
        CompressionError: A weight contains NaN or Inf; the message names it.
    """
    masks = {}
    for weight in find_weights(gm):
        annotation = pruning_annotation(weight.nodes[0])
        if annotation is not None:
            try:
                masks[weight.name] = mask_of(weight.tensor, annotation.spec)
            except CompressionError as error:
                raise CompressionError(
                    f"{weight.name}: {error}; exclude it in the config"
                ) from None
    return masks


@dataclass(frozen=True)
class PruneWeights(Pass):
    """Store of each annotated weight only what is not zero.

    Before:
        %w = get_attr[fc.weight]
        %y = linear(%x, %w)

    After:
        %values = get_attr[fc.weight_values]
        %mask = get_attr[fc.weight_mask]
        %w = graphopt.sparse_to_dense(%values, %mask, shape)
        %y = linear(%x, %w)

    The values are a weight like any other to passes behind this one, which may palettize or quantize
    them.

    Attributes:
        masks: Name → where elements stay, beside those that an earlier stage found; weights without
            one are masked by their specs.

    Examples:
        >>> from graphopt.passes import AnnotatePruning
        >>> from graphopt.pruning import MagnitudePrunerConfig
        >>> gm = program.graph_module
        >>> _ = AnnotatePruning(MagnitudePrunerConfig())(gm), PruneWeights()(gm)
        >>> sparse = torch.ops.graphopt.sparse_to_dense.default
        >>> len(gm.graph.find_nodes(op="call_function", target=sparse))
        2
    """

    name: ClassVar[str] = "prune-weights"
    after: ClassVar[tuple[type[Pass], ...]] = (AnnotatePruning,)
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    @override
    def run(self, edit: Editor) -> None:
        rows = []
        masks = {**findings_of(edit.gm).masks, **self.masks}
        for weight in find_weights(edit.gm):
            annotation = pruning_annotation(weight.nodes[0])
            if annotation is None:
                continue
            mask = masks.get(weight.name)
            if mask is None:
                mask = mask_of(weight.tensor, annotation.spec)
            pruned = prune(weight.tensor, mask)
            rows.append(replace_weight(edit, weight, pruned, annotation.spec))
        keep_findings(edit.gm, masks={})
        edit.record(rows)

    @override
    def expected(self, before: fx.GraphModule, after: fx.GraphModule) -> fx.GraphModule:
        """The graph with zeros in its dense weights."""
        del after
        edit = Editor(before)
        masks = {**annotated_masks(before), **findings_of(before).masks, **self.masks}
        for weight in find_weights(before):
            if weight.name in masks and pruning_annotation(weight.nodes[0]) is not None:
                value = weight.tensor.detach() * masks[weight.name]
                edit.set_value(weight.nodes[0], value, tied=weight.nodes[1:])
        return before
