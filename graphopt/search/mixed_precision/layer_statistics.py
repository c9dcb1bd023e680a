"""What has to be known of all data before single batches are measured: ranges and moments of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.value_facts import with_known_range
from graphopt.fitting.channel_moments import ChannelMoments
from graphopt.ir import op_info
from graphopt.ir.editor import operands
from graphopt.passes.correct_bias import channel_axis
from graphopt.prepared import ActivationQuantizer
from graphopt.progress import track
from graphopt.run.batches import Batch
from graphopt.run.interpreter import Hook
from graphopt.run.partial_rerun import Downstream, PartialRerun, RerunPlan
from graphopt.schemes.base import StoredWeight
from graphopt.search.mixed_precision.candidates import Candidate
from graphopt.search.mixed_precision.layers import Layer
from graphopt.search.mixed_precision.options import Correction
from graphopt.specs import QuantizationSpec

__all__ = [
    "Affine",
    "CandidateGraph",
    "Correction",
    "CorrectionPoint",
    "LayerStatistics",
    "collect_statistics",
    "correction_point",
]


@dataclass(frozen=True)
class CandidateGraph:
    """A graph and what its layers can become.

    Attributes:
        plan: The uncompressed graph.
        layers: Layers in the order of the graph.
        candidates: Candidates by name.
        forms: Layer → candidate → stored form.
        belows: Layer → what depends on it.
    """

    plan: RerunPlan
    layers: tuple[Layer, ...]
    candidates: Mapping[str, Candidate]
    forms: Mapping[str, Mapping[str, StoredWeight | None]]
    belows: Mapping[str, Downstream]


@dataclass(frozen=True)
class CorrectionPoint:
    """Where a correction acts on a layer.

    Attributes:
        node: Name of the layer's op.
        axis: Channel axis of its output.
        gains: Whether gains are corrected (a batch norm follows) or only means.
    """

    node: str
    axis: int
    gains: bool


@dataclass(frozen=True)
class Affine:
    """Per-channel `gain · z + shift` on an op's output, float32 [channels]."""

    axis: int
    gain: Tensor
    shift: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        """Apply it."""
        shape = [1] * value.ndim
        shape[self.axis] = -1
        gain, shift = self.gain.to(value.dtype), self.shift.to(value.dtype)
        return value * gain.reshape(shape) + shift.reshape(shape)


@dataclass(frozen=True)
class LayerStatistics:
    """Outcome for all data.

    Attributes:
        roundings: (layer, candidate) → what rounds the op's data input, its range known.
        corrections: (layer, candidate) → what the correction does to the op's output.
    """

    roundings: dict[tuple[str, str], ActivationQuantizer]
    corrections: dict[tuple[str, str], Affine]

    def hooks(
        self, layer: Layer, candidate: Candidate, point: CorrectionPoint | None, plan: RerunPlan
    ) -> dict[str, dict[fx.Node, Hook]]:
        """Hooks of `PartialRerun.values` for a candidate."""
        hooks: dict[str, dict[fx.Node, Hook]] = {}
        rounding = self.roundings.get((layer.name, candidate.name))
        if rounding is not None:
            hooks["before"] = {plan.by_name[name]: rounding for name in layer.nodes}
        affine = self.corrections.get((layer.name, candidate.name))
        if affine is not None and point is not None:
            hooks["behind"] = {plan.by_name[point.node]: affine}
        return hooks


def correction_point(
    plan: RerunPlan, layer: Layer, correction: Correction | None
) -> CorrectionPoint | None:
    """Where the correction acts on a layer; None where it does not."""
    if correction is None or len(layer.nodes) != 1:
        return None
    node = plan.by_name[layer.nodes[0]]
    axis = channel_axis(node)
    if axis is None:
        return None
    normed = len(node.users) == 1 and op_info.is_batch_norm(next(iter(node.users)))
    if normed:
        return CorrectionPoint(node.name, axis, True) if correction != "bias" else None
    return CorrectionPoint(node.name, axis, False) if correction != "batch_norm" else None


def collect_statistics(
    graph: CandidateGraph,
    batches: Sequence[Batch],
    correction: Correction | None,
    *,
    progress: bool | None = None,
) -> LayerStatistics:
    """Run all data once through every layer and its candidates, if anything asks for it.

    Ranges of activations are those that their spec's statistics find, as a `Quantizer` has them. A
    correction gives a compressed layer's
    output the mean (and, in front of a batch norm, the variance) of the uncompressed one's; for a
    single layer that is what new batch-norm statistics and corrected biases do.

    Args:
        graph: The graph and what its layers can become.
        batches: All data.
        correction: What will be corrected afterwards, or None.
        progress: Show a bar; None shows it on a terminal.
    """
    plan, layers, candidates = graph.plan, graph.layers, graph.candidates
    forms, belows = graph.forms, graph.belows
    points = {layer.name: correction_point(plan, layer, correction) for layer in layers}
    ranged = [
        layer for layer in layers if any(candidates[name].activation for name in layer.candidates)
    ]
    corrected = [layer for layer in layers if points[layer.name] is not None]
    if not ranged and not corrected:
        return LayerStatistics({}, {})
    roundings = {
        (layer.name, name): _rounding(plan, layer, candidates[name].activation)
        for layer in ranged
        for name in layer.candidates
        if candidates[name].activation is not None
    }
    moments: dict[tuple[str, str], ChannelMoments] = {}
    for batch in track(batches, "collecting statistics", len(batches), enabled=progress):
        run = PartialRerun(plan, batch)
        for layer in layers:
            if layer not in ranged and layer not in corrected:
                continue
            run.advance(belows[layer.name].first)
            for node in _data_inputs(plan, layer) if layer in ranged else ():
                for name in layer.candidates:
                    if (layer.name, name) in roundings:
                        roundings[layer.name, name].observe(run.exact(node))
            point = points[layer.name]
            if point is not None:
                _add_moments(
                    plan, run, layer, forms[layer.name], belows[layer.name], point, moments
                )
    for rounding in roundings.values():
        rounding.settle()
        rounding.rounding = True
    return LayerStatistics(roundings, _affines(corrected, points, moments))


def _data_inputs(plan: RerunPlan, layer: Layer) -> list[fx.Node]:
    """What the layer's ops read besides constants."""
    return [
        next(operand for operand in operands(plan.by_name[name]) if operand not in plan.constant)
        for name in layer.nodes
    ]


def _rounding(plan: RerunPlan, layer: Layer, spec: QuantizationSpec | None) -> ActivationQuantizer:
    assert spec is not None
    return ActivationQuantizer(with_known_range(spec, _data_inputs(plan, layer))).eval()


def _add_moments(
    plan: RerunPlan,
    run: PartialRerun,
    layer: Layer,
    forms: Mapping[str, StoredWeight | None],
    below: Downstream,
    point: CorrectionPoint,
    moments: dict[tuple[str, str], ChannelMoments],
) -> None:
    node = plan.by_name[point.node]
    local = plan.downstream(below.sources, node)

    def add(name: str, value: Any) -> None:
        moments.setdefault((layer.name, name), ChannelMoments(point.axis)).add(value)

    add("", run.exact(node))
    for name, form in forms.items():
        if form is not None:
            weights = dict.fromkeys(below.sources, form.dense())
            add(name, run.values(local, weights, [node])[0])


def _affines(
    layers: Sequence[Layer],
    points: Mapping[str, CorrectionPoint | None],
    moments: Mapping[tuple[str, str], ChannelMoments],
) -> dict[tuple[str, str], Affine]:
    affines = {}
    for layer in layers:
        point, exact = points[layer.name], moments[layer.name, ""]
        assert point is not None
        for name in layer.candidates:
            own = moments.get((layer.name, name))
            if own is None:
                continue
            gain = torch.ones_like(exact.mean)
            if point.gains:
                spread = own.variance
                gain = torch.where(spread > 0, exact.variance / spread.clamp_min(1e-300), 1.0)
                gain = gain.sqrt()
            shift = exact.mean - gain * own.mean
            affines[layer.name, name] = Affine(point.axis, gain.float(), shift.float())
    return affines
