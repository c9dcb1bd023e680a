"""Put the modules through which palettes train into an annotated graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from graphopt.analysis.weights import find_weights
from graphopt.errors import CompressionError
from graphopt.ir.annotations import palette_annotation
from graphopt.ir.editor import Editor
from graphopt.numerics.device import device_of
from graphopt.passes.pass_base import Pass
from graphopt.prepared import QUANTIZERS, Origin, WeightPalettizer
from graphopt.prepared.state import is_read_by
from graphopt.schemes.palettize import PalettizedWeight
from graphopt.specs import DKMTrainingSpec

__all__ = ["InsertPalettizers"]


@dataclass(frozen=True)
class InsertPalettizers(Pass):
    """Insert a `WeightPalettizer` behind every annotated weight.

    Before:
        %w = get_attr[fc.weight]
        %y = linear(%x, %w)

    After:
        %w = get_attr[fc.weight]
        %p = _quantizers.of_fc_weight(%w)
        %y = linear(%x, %p)

    Attributes:
        palettes: Name of the weight → clustering to start from.
        default: What a spec's default strategy stands for; None is the straight-through estimator.
        device: Torch device that soft palettes are computed on; None is where the weights are.

    Raises:
        CompressionError: A weight is to keep sparse outliers.

    Examples:
        >>> from graphopt.palettization import KMeansPalettizerConfig
        >>> from graphopt.passes import AnnotatePalettization, cluster_annotated
        >>> gm = program.graph_module
        >>> _ = AnnotatePalettization(KMeansPalettizerConfig())(gm)
        >>> InsertPalettizers(cluster_annotated(gm))(gm).modified
        True
        >>> [node.target for node in gm.graph.nodes if node.op == "call_module"]
        ['_quantizers.of_0_weight', '_quantizers.of_2_weight']
    """

    name: ClassVar[str] = "insert-palettizers"
    tolerance: ClassVar[float | None] = None
    palettes: Mapping[str, PalettizedWeight]
    default: DKMTrainingSpec | None = None
    device: str | None = None

    @override
    def run(self, edit: Editor) -> None:
        for weight in find_weights(edit.gm):
            annotation = palette_annotation(weight.nodes[0])
            if annotation is None or is_read_by(edit.gm, weight.nodes, WeightPalettizer):
                continue
            if annotation.spec.outlier_fraction:
                raise CompressionError(
                    f"{weight.name}: sparse outliers cannot be trained; use outlier_fraction=0 for"
                    " training, or calibrate"
                )
            strategy = annotation.spec.training_strategy_spec.differentiable(self.default)
            palettizer = WeightPalettizer(
                weight.tensor,
                self.palettes[weight.name],
                annotation.spec,
                annotation.output_axis,
                strategy,
            )
            palettizer.device = device_of(self.device)
            frames = weight.uses[0].frames
            owner = frames[-1].name if frames else ""
            palettizer.origin = Origin(weight.name, owner, annotation.path)
            path = edit.module(
                f"{QUANTIZERS}.of_{weight.name.replace('.', '_')}", palettizer.eval()
            )
            for node in weight.nodes:
                made = edit.run_module(path, node, place=node.next, like=node)
                edit.redirect(node, made, lambda _: False)
