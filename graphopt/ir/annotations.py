"""Annotations: the only file that knows the keys under which specs live in `node.meta`.

It also holds what passes hand on to later ones in `gm.meta`. Annotations are kept by name and value,
never by node, so that copies of a graph keep them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar, cast

from torch import fx

from graphopt.ir.captured_module import KeptGraph
from graphopt.ir.records import ActivationRecord, CompressionRecord, TensorRecord, merged
from graphopt.specs import PalettizationSpec, PruningSpec, QuantizationSpec
from graphopt.specs.model import SpecModel

__all__ = [
    "ActivationPoint",
    "WeightAnnotation",
    "annotate_dropout",
    "annotate_input",
    "annotate_noise",
    "annotate_norm",
    "annotate_output",
    "annotate_pruning",
    "annotate_rounding",
    "annotate_weight",
    "clear_annotations",
    "clear_notes",
    "describe_annotations",
    "dropout_of",
    "dropout_rate",
    "forget_record",
    "hand_on",
    "handed_on",
    "input_points",
    "is_fused_norm",
    "is_rescaled",
    "keep_neutral_graph",
    "mark_rescaled",
    "move_output",
    "neutral_graph_of",
    "note",
    "note_pass",
    "notes_of",
    "output_point",
    "palette_annotation",
    "passes_provided",
    "passes_run",
    "pruning_annotation",
    "quantization_annotation",
    "record",
    "record_of",
    "replace_activations",
    "rounding_of",
    "weight_annotation",
]

_KEY = "graphopt"
# not saved with a module
_FINDINGS, _NEUTRAL = "graphopt_findings", "graphopt_neutral"
_WEIGHT, _OUTPUT, _INPUTS, _NORM = "weight", "output", "inputs", "norm"
_PRUNING, _DROPOUT, _NOISE = "pruning", "dropout", "noise"
_ROUNDING, _RESCALED = "rounding", "rescaled"
_RECORD, _NOTES = "graphopt.table", "graphopt.notes"
_RUN, _PROVIDED = "graphopt.passes", "graphopt.passes_provided"


SpecT = TypeVar("SpecT", bound=SpecModel)


@dataclass(frozen=True)
class WeightAnnotation(Generic[SpecT]):
    """What a constant's node is to become.

    Attributes:
        spec: The spec.
        output_axis: Output-channel axis of the stored tensor.
        path: Config path that decided.
        note: What people should know about the spec beside what it says, or "".
    """

    spec: SpecT
    output_axis: int
    path: str = ""
    note: str = ""


@dataclass(frozen=True)
class ActivationPoint:
    """A place where an activation is quantized.

    Attributes:
        group: Name that all places with the same scale have in common.
        spec: The spec, with the range that its ops imply.
        path: Config path that decided.
        derived: Whether the op hands on values that are rounded already, such as a view or a max
            pool: they need no rounding in PyTorch, but targets recognise the op by it.
        balanced: Whether its channels are to be brought to one range in the rows of the weight that
            gives them, since a few of them are far wider than the others.
    """

    group: str
    spec: QuantizationSpec
    path: str = ""
    derived: bool = False
    balanced: bool = False


def _put(node: fx.Node, key: str, value: object) -> None:
    node.meta[_KEY] = {**node.meta.get(_KEY, {}), key: value}


def annotate_weight(node: fx.Node, annotation: WeightAnnotation[SpecT]) -> None:
    """Attach an annotation to the node of a constant."""
    _put(node, _WEIGHT, annotation)


def weight_annotation(node: fx.Node, kind: type[SpecT]) -> WeightAnnotation[SpecT] | None:
    """The annotation of a constant with a spec of this kind, if it has one."""
    annotation = node.meta.get(_KEY, {}).get(_WEIGHT)
    fits = annotation is not None and isinstance(annotation.spec, kind)
    return annotation if fits else None


def palette_annotation(node: fx.Node) -> WeightAnnotation[PalettizationSpec] | None:
    """The annotation of a constant that is to be palettized, if it is one."""
    return weight_annotation(node, PalettizationSpec)


def quantization_annotation(node: fx.Node) -> WeightAnnotation[QuantizationSpec] | None:
    """The annotation of a constant that is to be quantized, if it is one."""
    return weight_annotation(node, QuantizationSpec)


def annotate_pruning(node: fx.Node, annotation: WeightAnnotation[PruningSpec]) -> None:
    """Attach what is to be pruned to the node of a constant, beside its other annotation."""
    _put(node, _PRUNING, annotation)


def pruning_annotation(node: fx.Node) -> WeightAnnotation[PruningSpec] | None:
    """The annotation of a constant that is to be pruned, if it is one."""
    return cast("WeightAnnotation[PruningSpec] | None", node.meta.get(_KEY, {}).get(_PRUNING))


def annotate_output(node: fx.Node, point: ActivationPoint) -> None:
    """Quantize what a node gives to all its users."""
    _put(node, _OUTPUT, point)


def output_point(node: fx.Node) -> ActivationPoint | None:
    """Where a node's output is quantized, if it is."""
    return cast("ActivationPoint | None", node.meta.get(_KEY, {}).get(_OUTPUT))


def move_output(old: fx.Node, new: fx.Node) -> None:
    """Hand the annotation of an output on to the node that takes its place."""
    point = output_point(old)
    if point is not None:
        annotate_output(new, point)


def annotate_input(node: fx.Node, position: int, point: ActivationPoint) -> None:
    """Quantize one operand of a node for this node alone.

    Args:
        node: The node that reads the operand.
        position: Place among the nodes in its arguments (`graphopt.editor.operands`).
        point: What becomes of it.
    """
    _put(node, _INPUTS, {**input_points(node), position: point})


def input_points(node: fx.Node) -> dict[int, ActivationPoint]:
    """Position of an operand → where it is quantized for this node."""
    return dict(node.meta.get(_KEY, {}).get(_INPUTS, {}))


def annotate_rounding(node: fx.Node, point: ActivationPoint) -> None:
    """Remember of an op that rounds a value which annotation asked for it."""
    _put(node, _ROUNDING, point)


def rounding_of(node: fx.Node) -> ActivationPoint | None:
    """The annotation that asked for an op that rounds, where it is known."""
    return cast("ActivationPoint | None", node.meta.get(_KEY, {}).get(_ROUNDING))


def mark_rescaled(node: fx.Node) -> None:
    """Mark a value, or a constant that moves one, whose channels differ from those of the model."""
    _put(node, _RESCALED, True)


def is_rescaled(node: fx.Node) -> bool:
    """Whether a node is marked by `mark_rescaled`."""
    return bool(node.meta.get(_KEY, {}).get(_RESCALED))


def annotate_norm(node: fx.Node) -> None:
    """Mark a batch norm that is computed as one with the convolution before it."""
    _put(node, _NORM, True)


def is_fused_norm(node: fx.Node) -> bool:
    """Whether a batch norm is marked by `annotate_norm`."""
    return bool(node.meta.get(_KEY, {}).get(_NORM))


def annotate_dropout(node: fx.Node, rate: float, kind: str = "dropout") -> None:
    """Remember that a copy was a dropout of this rate and kind, an op's name."""
    _put(node, _DROPOUT, (rate, kind))


def dropout_of(node: fx.Node) -> tuple[float, str] | None:
    """Rate and kind of the dropout that a node was, if it was one."""
    return cast("tuple[float, str] | None", node.meta.get(_KEY, {}).get(_DROPOUT))


def dropout_rate(node: fx.Node) -> float | None:
    """The rate of the dropout that a node was, if it was one."""
    known = dropout_of(node)
    return None if known is None else known[0]


def annotate_noise(node: fx.Node, low: float, high: float) -> None:
    """Remember that a leaky ReLU draws its slope between two values in training."""
    _put(node, _NOISE, (low, high))


def noise_of(node: fx.Node) -> tuple[float, float] | None:
    """Between which values a leaky ReLU draws its slope in training, if it does."""
    return cast("tuple[float, float] | None", node.meta.get(_KEY, {}).get(_NOISE))


def clear_annotations(node: fx.Node) -> None:
    """Detach everything that is attached to a node."""
    node.meta.pop(_KEY, None)


def describe_annotations(node: fx.Node) -> str:
    """What is attached to a node, as one line of text."""
    parts = []
    for key in (_WEIGHT, _PRUNING):
        weight = node.meta.get(_KEY, {}).get(key)
        if weight is not None:
            parts.append(f"{key}: {weight.spec!r}")
    point = output_point(node)
    if point is not None:
        parts.append(f"output in {point.group}: {point.spec!r}")
    for position, place in input_points(node).items():
        parts.append(f"operand {position} in {place.group}: {place.spec!r}")
    if is_fused_norm(node):
        parts.append("norm of the op before")
    return "; ".join(parts)


def hand_on(gm: fx.GraphModule, value: object) -> None:
    """Leave what was found out for later passes (`graphopt.prepared.findings`); it is not saved."""
    gm.meta[_FINDINGS] = value


def handed_on(gm: fx.GraphModule) -> object | None:
    """What earlier passes left, if any did."""
    return cast("object | None", gm.meta.get(_FINDINGS))


def record_of(gm: fx.GraphModule) -> CompressionRecord:
    """What was done to each tensor of a graph so far; empty before any compression."""
    return cast("CompressionRecord", gm.meta.get(_RECORD, CompressionRecord(())))


def record(
    gm: fx.GraphModule,
    rows: Sequence[TensorRecord] = (),
    *,
    remarks: Sequence[str] = (),
    activations: Sequence[ActivationRecord] = (),
) -> None:
    """Add to the record of a graph; rows replace earlier ones of the same tensor.

    Args:
        gm: The graph.
        rows: One per tensor.
        remarks: On the whole model.
        activations: One per scale of activations, and per op that stays in float.
    """
    added = CompressionRecord(tuple(rows), tuple(remarks), tuple(activations))
    gm.meta[_RECORD] = merged(record_of(gm), added)


def replace_activations(gm: fx.GraphModule, rows: Sequence[ActivationRecord]) -> None:
    """Replace records of activations by others of the same name and status."""
    known, kept = {(row.name, row.status): row for row in rows}, record_of(gm)
    if known:
        changed = tuple(known.get((row.name, row.status), row) for row in kept.activations)
        gm.meta[_RECORD] = replace(kept, activations=changed)


def forget_record(gm: fx.GraphModule) -> None:
    """Drop the record of a graph."""
    gm.meta.pop(_RECORD, None)


def notes_of(gm: fx.GraphModule) -> tuple[str, ...]:
    """What passes of a target had to say about the form of the graph's weights."""
    return tuple(gm.meta.get(_NOTES, ()))


def note(gm: fx.GraphModule, text: str) -> None:
    """Add a note on the form of the graph's weights."""
    gm.meta[_NOTES] = (*notes_of(gm), text)


def clear_notes(gm: fx.GraphModule) -> None:
    """Drop the notes of a graph."""
    gm.meta[_NOTES] = ()


def passes_run(gm: fx.GraphModule) -> tuple[str, ...]:
    """Names of our passes that a graph has seen, in order."""
    return tuple(gm.meta.get(_RUN, ()))


def passes_provided(gm: fx.GraphModule) -> tuple[str, ...]:
    """Names of the passes in whose place others have run."""
    return tuple(gm.meta.get(_PROVIDED, ()))


def note_pass(gm: fx.GraphModule, name: str, provides: Sequence[str] = ()) -> None:
    """Remember that a pass has run.

    Args:
        gm: The graph.
        name: Its name.
        provides: Names of passes in whose place it stands.
    """
    gm.meta[_RUN] = (*passes_run(gm), name)
    if provides:
        gm.meta[_PROVIDED] = (*passes_provided(gm), *provides)


def keep_neutral_graph(gm: fx.GraphModule, kept: KeptGraph) -> None:
    """Leave the graph in our vocabulary beside the one that was made of it for a target."""
    gm.meta[_NEUTRAL] = kept


def neutral_graph_of(gm: fx.GraphModule) -> KeptGraph | None:
    """The graph that `keep_neutral_graph` left, if there is one."""
    return cast("KeptGraph | None", gm.meta.get(_NEUTRAL))
