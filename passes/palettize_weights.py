"""Replace annotated weights by table lookups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx
from typing_extensions import override

from graphopt.analysis.weights import find_weights
from graphopt.fitting.clustering import cluster_annotated
from graphopt.ir.annotations import palette_annotation
from graphopt.ir.editor import Editor
from graphopt.passes.annotate_palettization import AnnotatePalettization
from graphopt.passes.pass_base import Pass
from graphopt.prepared.findings import findings_of, keep_findings
from graphopt.schemes.palettize import PalettizedWeight
from graphopt.schemes.rewrite import replace_weight

__all__ = ["PalettizeWeights"]


@dataclass(frozen=True)
class PalettizeWeights(Pass):
    """Replace each annotated weight by a lookup of its indices.

    Before:
        %w = get_attr[fc.weight]
        %y = linear(%x, %w)

    After:
        %indices = get_attr[fc.weight_indices]
        %lut = get_attr[fc.weight_lut]
        %w = graphopt.lut_to_dense(%indices, %lut, n_bits, shape)
        %y = linear(%x, %w)

    A quantized table goes through `graphopt.shift_scale` first, a per-channel scale through another
    one behind the lookup, and outliers (`graphopt.sparse_to_dense`) are added last. A tied weight
    gets one lookup, which all its users share.

    Attributes:
        palettes: Clusterings made before (`cluster_annotated`), beside those that an earlier pass
            found; weights without one are clustered here.
        seed: Seed of vector tables.

    Examples:
        >>> from graphopt.palettization import KMeansPalettizerConfig
        >>> from graphopt.passes import AnnotatePalettization
        >>> module = graphopt.capture(model, example).graph_module
        >>> for step in (AnnotatePalettization(KMeansPalettizerConfig()), PalettizeWeights()):
        ...     _ = step(module)
        >>> lookup = torch.ops.graphopt.lut_to_dense.default
        >>> len(module.graph.find_nodes(op="call_function", target=lookup))
        2
    """

    name: ClassVar[str] = "palettize-weights"
    after: ClassVar[tuple[type[Pass], ...]] = (AnnotatePalettization,)
    palettes: Mapping[str, PalettizedWeight] = field(default_factory=dict)
    seed: int = 0

    @override
    def run(self, edit: Editor) -> None:
        weights = [
            weight for weight in find_weights(edit.gm) if palette_annotation(weight.nodes[0])
        ]
        names = [weight.name for weight in weights]
        known = findings_of(edit.gm).stored
        palettes = {**known, **self.palettes}
        if any(name not in palettes for name in names):
            palettes |= cluster_annotated(edit.gm, progress=False, seed=self.seed)
        rows = []
        for weight in weights:
            annotation = palette_annotation(weight.nodes[0])
            assert annotation is not None
            rows.append(replace_weight(edit, weight, palettes[weight.name], annotation.spec))
        keep_findings(edit.gm, stored={name: known[name] for name in known if name not in names})
        edit.record(rows)

    @override
    def expected(self, before: fx.GraphModule, after: fx.GraphModule) -> fx.GraphModule:
        """The graph with each annotated weight's values replaced by those of its palette."""
        del after
        edit = Editor(before)
        palettes = {**findings_of(before).stored, **self.palettes}
        weights = [
            candidate
            for candidate in find_weights(before)
            if palette_annotation(candidate.nodes[0])
        ]
        rest = [weight.name for weight in weights if weight.name not in palettes]
        palettes |= cluster_annotated(before, progress=False, seed=self.seed, names=rest)
        for weight in weights:
            edit.set_value(weight.nodes[0], palettes[weight.name].dense(), tied=weight.nodes[1:])
        return before
