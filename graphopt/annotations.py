"""Annotations: the only file that knows the keys under which specs live in `node.meta`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import fx

from graphopt.specs import PalettizationSpec

__all__ = ["WeightAnnotation", "annotate_weight", "weight_annotation"]

_KEY = "graphopt"
_WEIGHT = "weight"


@dataclass(frozen=True)
class WeightAnnotation:
    """What a constant's node is to become.

    Attributes:
        spec: The spec.
        output_axis: Output-channel axis of the stored tensor.
        path: Config path that decided.
    """

    spec: PalettizationSpec
    output_axis: int
    path: str = ""


def annotate_weight(node: fx.Node, annotation: WeightAnnotation) -> None:
    """Attach an annotation to the node of a constant; copies of the graph keep it."""
    node.meta[_KEY] = {**node.meta.get(_KEY, {}), _WEIGHT: annotation}


def weight_annotation(node: fx.Node) -> WeightAnnotation | None:
    """The annotation of a constant's node, if any."""
    return cast("WeightAnnotation | None", node.meta.get(_KEY, {}).get(_WEIGHT))
