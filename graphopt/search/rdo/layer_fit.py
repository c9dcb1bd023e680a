"""One layer in one candidate's form: searched, fed back, or rounded to the nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from graphopt.fitting.layer_target import LayerTarget
from graphopt.fitting.moments import Sample, collect_moments
from graphopt.fitting.target_fit import TargetFit, TargetOptions, fit_to_target
from graphopt.schemes.base import Statistics, StoredWeight
from graphopt.schemes.registry import scheme_of
from graphopt.search.mixed_precision.candidates import Candidate
from graphopt.search.rdo.config import RDOConfig
from graphopt.search.rdo.graph_layers import GraphLayer

__all__ = ["LayerFit", "LooseLayer", "fit_layer", "take_target"]

_NO_FEEDBACK = "no error feedback for lookups, tied weights and ops of other forms"


@dataclass(frozen=True)
class LooseLayer:
    """What fits need of a layer; no graph comes with it.

    Attributes:
        weight: The stored tensor.
        output_axis: Its output-channel axis.
        bias: The exact bias, where it takes up the mean of the layer's error.
    """

    weight: Tensor
    output_axis: int
    bias: Tensor | None

    @classmethod
    def of(cls, layer: GraphLayer) -> LooseLayer:
        """A layer without its graph."""
        bias = None if layer.use is None else layer.bias_value
        return cls(layer.weight.tensor.detach(), layer.entry.output_axis, bias)


@dataclass(frozen=True)
class LayerFit:
    """A layer in its compressed form.

    Attributes:
        candidate: Name of the candidate.
        stored: The stored form; None for a weight that is kept.
        bias: The new value of the layer's bias, or None.
        how: "kept", "rounded", "searched", "error feedback" or "adaptive rounding".
        coded: Bits of an ideal entropy coder, side information included.
        note: Why something was not done, or "".
    """

    candidate: str
    stored: StoredWeight | None
    bias: Tensor | None
    how: str
    coded: float
    note: str = ""


def take_target(
    layer: GraphLayer,
    inputs: Sequence[Tensor],
    exact: Sequence[Tensor],
    saliency: Sequence[Tensor] | None,
    missing: Sequence[tuple[Tensor, Tensor]] | None,
    config: RDOConfig,
) -> LayerTarget | None:
    """Reduce a layer's inputs to what its fits need; None where the data never reached it.

    Args:
        layer: The layer, with a use other than a lookup.
        inputs: What it reads for each batch.
        exact: What it would read in the exact program.
        saliency: Per batch [batch, positions], or None.
        missing: The other operand of the sum behind it, exact and as it is.
        config: Options.
    """
    assert layer.use is not None
    moments = collect_moments(
        layer.use.loose(),
        inputs,
        exact,
        saliency,
        missing if config.feedback.compensate else None,
        centred=layer.bias is not None,
        sample=Sample(config.seed),
    )
    if moments is None:
        return None
    feedback = config.feedback
    return LayerTarget.of(
        layer.use.loose(),
        layer.weight.tensor.detach(),
        moments,
        compensate=feedback.compensate,
        damping=feedback.damping if feedback.enabled else None,
    )


def fit_layer(
    layer: LooseLayer,
    candidate: Candidate,
    target: LayerTarget | None,
    config: RDOConfig,
    rate_weight: float,
    importance: Tensor | None,
) -> LayerFit:
    """The best form of a layer under one candidate.

    Args:
        layer: The layer.
        candidate: What it becomes.
        target: From `take_target`; None fits the weight alone.
        config: Options.
        rate_weight: λ, for rate "entropy".
        importance: What a squared error of each output row costs, [rows], for rate "entropy".

    Raises:
        CompressionError: The weight contains NaN or Inf, or the candidate does not fit its shape.
    """
    spec = candidate.weight
    if spec is None:
        bits = layer.weight.numel() * layer.weight.element_size() * 8
        return LayerFit(candidate.name, None, None, "kept", bits)
    weight, axis, seed = layer.weight, layer.output_axis, config.seed
    fit = None
    if target is not None:
        options = TargetOptions(
            output_axis=axis,
            search_scales=config.blocks.scales,
            feedback=config.feedback.enabled,
            damping=config.feedback.damping,
            rate_weight=rate_weight if config.rate == "entropy" else None,
            importance=importance,
            seed=seed,
        )
        fit = fit_to_target(spec, target, options)
    if fit is None:
        rounded = scheme_of(spec).make(weight, spec, Statistics(axis, seed=seed))
        fit = TargetFit(rounded, "rounded", _NO_FEEDBACK)
    stored, how, note = fit
    bias = None
    if layer.bias is not None and target is not None:
        bias = target.bias(layer.bias, stored.dense())
    coded = stored.coded_bits()
    return LayerFit(candidate.name, stored.measured(weight), bias, how, coded, note)
