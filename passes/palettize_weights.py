"""Replace annotated weights by table lookups."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, fx
from typing_extensions import override

from graphopt.analysis.weights import find_weights
from graphopt.errors import CompressionError
from graphopt.ir.annotations import WeightAnnotation, palette_annotation
from graphopt.ir.editor import Editor
from graphopt.numerics.parallel import map_tasks
from graphopt.passes.annotate_palettization import AnnotatePalettization
from graphopt.passes.pass_base import Pass
from graphopt.prepared.findings import findings_of, keep_findings
from graphopt.progress import track
from graphopt.schemes.palettize import PalettizedWeight, palettize
from graphopt.schemes.rewrite import replace_weight
from graphopt.specs import PalettizationSpec

__all__ = ["PalettizeWeights", "cluster_annotated"]

_FLOOR = 1e-3  # of the mean importance


def cluster_annotated(
    gm: fx.GraphModule,
    *,
    progress: bool | None = None,
    seed: int = 0,
    importance: Mapping[str, Tensor] | None = None,
    names: Collection[str] | None = None,
) -> dict[str, PalettizedWeight]:
    """Cluster every annotated weight of a graph, layers side by side.

    Args:
        gm: A graph that `AnnotatePalettization` has seen.
        progress: Show a bar; None shows it on a terminal.
        seed: Seed of vector tables.
        importance: Name → weight of each element's squared error; others weigh all alike, and so
            do elements without any beside a thousandth of the mean.
        names: Weights to cluster; None is all.

    Returns:
        Name of the tensor → its palettized form, in the order of the graph.

    Raises:
        CompressionError: A weight contains NaN or Inf; the message names it.
    """
    found = _annotated(gm)
    if names is not None:
        found = {name: found[name] for name in found if name in set(names)}
    order = sorted(found, key=lambda name: -found[name][0].numel())

    def cluster(name: str) -> tuple[str, PalettizedWeight]:
        tensor, annotation = found[name]
        try:
            return name, palettize(
                tensor,
                annotation.spec,
                output_axis=annotation.output_axis,
                seed=seed,
                importance=_smoothed((importance or {}).get(name)),
            )
        except CompressionError as error:
            raise CompressionError(
                f"{name}: {error}; exclude it in the config or repair the model"
            ) from None

    done = dict(track(map_tasks(cluster, order), "palettizing", len(order), enabled=progress))
    return {name: done[name] for name in found}


def _smoothed(importance: Tensor | None) -> Tensor | None:
    """Importance with a floor, so that what the data did not reach keeps its place."""
    if importance is None or not bool(importance.any()):
        return None
    return importance + _FLOOR * importance.mean()


def _annotated(gm: fx.GraphModule) -> dict[str, tuple[Tensor, WeightAnnotation[PalettizationSpec]]]:
    edit = Editor(gm)
    found: dict[str, tuple[Tensor, WeightAnnotation[PalettizationSpec]]] = {}
    seen: set[int] = set()
    for node in edit.constants():
        annotation = palette_annotation(node)
        if annotation is None:
            continue
        tensor = edit.value(node)
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[str(node.target)] = (tensor, annotation)
    return found


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
        palettes = {**findings_of(edit.gm).palettes, **self.palettes}
        if any(name not in palettes for name in names):
            palettes |= cluster_annotated(edit.gm, progress=False, seed=self.seed)
        rows = []
        for weight in weights:
            annotation = palette_annotation(weight.nodes[0])
            assert annotation is not None
            rows.append(replace_weight(edit, weight, palettes[weight.name], annotation.spec))
        keep_findings(edit.gm, palettes={})
        edit.record(rows)

    @override
    def expected(self, before: fx.GraphModule, after: fx.GraphModule) -> fx.GraphModule:
        """The graph with each annotated weight's values replaced by those of its palette."""
        del after
        edit = Editor(before)
        palettes = {**findings_of(before).palettes, **self.palettes}
        weights = [each for each in find_weights(before) if palette_annotation(each.nodes[0])]
        rest = [weight.name for weight in weights if weight.name not in palettes]
        palettes |= cluster_annotated(before, progress=False, seed=self.seed, names=rest)
        for weight in weights:
            edit.set_value(weight.nodes[0], palettes[weight.name].dense(), tied=weight.nodes[1:])
        return before
