"""Give annotated weights the values that their palettes stand for, under their own names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from graphopt.analysis.weights import find_weights
from graphopt.ir.annotations import palette_annotation
from graphopt.ir.editor import Editor
from graphopt.numerics.parallel import map_tasks
from graphopt.passes.pass_base import Pass
from graphopt.schemes.palettize import PalettizedWeight
from graphopt.schemes.rewrite import row_of

__all__ = ["FakePalettize"]


@dataclass(frozen=True)
class FakePalettize(Pass):
    """Replace the values of annotated weights by their palettized ones; the graph stays as it is.

    The module then computes what the compressed program will, at the speed of the original, and
    with the original's state-dict names.

    Attributes:
        palettes: Name of the tensor → its clustering (`cluster_annotated`).
    """

    name: ClassVar[str] = "fake-palettize"
    tolerance: ClassVar[float | None] = None
    palettes: Mapping[str, PalettizedWeight]

    @override
    def run(self, edit: Editor) -> None:
        chosen = [
            (weight, annotation, self.palettes[weight.name])
            for weight in find_weights(edit.gm)
            if (annotation := palette_annotation(weight.nodes[0])) and weight.name in self.palettes
        ]
        dense = map_tasks(lambda choice: choice[2].dense(), chosen)
        rows = []
        for (weight, annotation, palettized), value in zip(chosen, dense, strict=True):
            rows.append(row_of(edit.gm, weight, palettized, annotation.spec))
            edit.set_value(weight.nodes[0], value, tied=weight.nodes[1:])
        edit.record(rows)
