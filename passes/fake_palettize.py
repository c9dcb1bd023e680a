"""Give annotated weights the values that their palettes stand for, under their own names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from graphopt.analysis.weights import find_weights
from graphopt.ir.annotations import palette_annotation
from graphopt.ir.decoded_tensor import DecodedTensor
from graphopt.ir.editor import Editor
from graphopt.numerics.parallel import map_tasks
from graphopt.passes.pass_base import Pass
from graphopt.schemes.palettize import PalettizedWeight
from graphopt.schemes.rewrite import row_of

__all__ = ["FakePalettize"]


@dataclass(frozen=True)
class FakePalettize(Pass):
    """Replace the values of annotated weights by their palettized ones; the graph stays as it is.

    The module then computes what the compressed program will, with the original's state-dict names.
    It holds codes and tables, which are decoded whenever an op reads a weight (`DecodedTensor`).

    Attributes:
        palettes: Name of the tensor → its clustering (`cluster_annotated`).
        dense: Hold the decoded values instead: calls run at the speed of the original, and the
            weights take as much memory as the original's.

    Examples:
        >>> from graphopt.palettization import KMeansPalettizerConfig
        >>> from graphopt.passes import AnnotatePalettization, cluster_annotated
        >>> gm = program.graph_module
        >>> _ = AnnotatePalettization(KMeansPalettizerConfig())(gm)
        >>> FakePalettize(cluster_annotated(gm))(gm).modified
        True
        >>> gm.state_dict().keys() == model.state_dict().keys()
        True
    """

    name: ClassVar[str] = "fake-palettize"
    tolerance: ClassVar[float | None] = None
    palettes: Mapping[str, PalettizedWeight]
    dense: bool = False

    @override
    def run(self, edit: Editor) -> None:
        chosen = [
            (weight, annotation, self.palettes[weight.name])
            for weight in find_weights(edit.gm)
            if (annotation := palette_annotation(weight.nodes[0])) and weight.name in self.palettes
        ]
        values = map_tasks(lambda choice: self._value(choice[0].tensor, choice[2]), chosen)
        rows = []
        for (weight, annotation, palettized), value in zip(chosen, values, strict=True):
            rows.append(row_of(edit.gm, weight, palettized, annotation.spec))
            edit.set_value(weight.nodes[0], value, tied=weight.nodes[1:])
        edit.record(rows)

    def _value(self, weight: Tensor, palettized: PalettizedWeight) -> Tensor:
        return palettized.dense() if self.dense else DecodedTensor(palettized, weight)
