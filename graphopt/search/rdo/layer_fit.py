"""One layer in one candidate's form: searched, fed back, or rounded to the nearest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from graphopt.analysis.matrix_form import WeightUse
from graphopt.fitting.layer_target import LayerTarget
from graphopt.fitting.moments import collect_moments
from graphopt.fitting.palettize_outputs import (
    NO_ORDER,
    palettize_by_columns,
    palettize_to_outputs,
)
from graphopt.fitting.quantize_outputs import quantize_to_outputs, search_scales
from graphopt.numerics.affine import grid_of
from graphopt.schemes.base import Statistics, StoredWeight
from graphopt.schemes.palettize import palettize
from graphopt.schemes.quantize import plan_blocks, quantize_weight
from graphopt.schemes.registry import scheme_of
from graphopt.search.mixed_precision.candidates import Candidate
from graphopt.search.rdo.config import RDOConfig
from graphopt.search.rdo.graph_layers import GraphLayer
from graphopt.search.rdo.rate import scales_by_rate
from graphopt.specs import PalettizationSpec, QuantizationSpec

__all__ = ["LayerFit", "fit_layer", "take_target"]

_Fit = tuple[StoredWeight, str, str]  # form, how it was found, why something was not done
_NO_FEEDBACK = "no error feedback for lookups, tied weights and ops of other forms"


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
        layer.use,
        inputs,
        exact,
        saliency,
        missing if config.feedback.compensate else None,
        centred=layer.bias is not None,
        seed=config.seed,
    )
    if moments is None:
        return None
    feedback = config.feedback
    return LayerTarget.of(
        layer.use,
        layer.weight.tensor.detach(),
        moments,
        compensate=feedback.compensate,
        damping=feedback.damping if feedback.enabled else None,
    )


def fit_layer(
    layer: GraphLayer,
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
        bits = layer.weight.tensor.numel() * layer.weight.tensor.element_size() * 8
        return LayerFit(candidate.name, None, None, "kept", bits)
    weight = layer.weight.tensor.detach()
    scheme = scheme_of(spec)
    stored: StoredWeight
    fit = _FITS.get(scheme.kind)
    if target is None or layer.use is None or fit is None:
        known = Statistics(layer.entry.output_axis, seed=config.seed)
        stored, how, note = scheme.make(weight, spec, known), "rounded", _NO_FEEDBACK
    else:
        stored, how, note = fit(layer, layer.use, spec, target, config, rate_weight, importance)
    bias = None
    if layer.bias_value is not None and layer.use is not None and target is not None:
        bias = target.bias(layer.bias_value, stored.dense())
    coded = stored.coded_bits()
    return LayerFit(candidate.name, stored.measured(weight), bias, how, coded, note)


def _quantized(
    layer: GraphLayer,
    use: WeightUse,
    spec: QuantizationSpec,
    target: LayerTarget,
    config: RDOConfig,
    rate_weight: float,
    importance: Tensor | None,
) -> _Fit:
    weight = target.weight
    blocks, _ = plan_blocks(weight.shape, layer.entry.output_axis, spec.granularity)
    scales = None
    if config.blocks.scales and config.rate == "entropy" and not grid_of(spec).is_float:
        scales = scales_by_rate(weight, spec, blocks, use, target.hessian, rate_weight, importance)
    elif config.blocks.scales:
        scales = search_scales(weight, spec, blocks, use, target.hessian)
    else:
        plain = quantize_weight(weight, spec, blocks)
        offset = None if plain.offset is None else plain.offset.float()
        scales = plain.scale.float(), offset
    if not config.feedback.enabled:
        rounded = quantize_weight(weight, spec, blocks, fixed=scales)
        return rounded, "searched" if config.blocks.scales else "rounded", ""
    fed = quantize_to_outputs(
        weight,
        spec,
        blocks,
        target.loss(config.feedback.damping),
        scales=scales,
        move_scales=config.blocks.scales,
    )
    if fed is None:
        rounded = quantize_weight(weight, spec, blocks, fixed=scales)
        return rounded, "searched", "its blocks do not follow the rows and columns of its matrix"
    return fed, "error feedback", ""


def _palettized(
    layer: GraphLayer,
    use: WeightUse,
    spec: PalettizationSpec,
    target: LayerTarget,
    config: RDOConfig,
    rate_weight: float,
    importance: Tensor | None,
) -> _Fit:
    del rate_weight, importance
    axis, seed = layer.entry.output_axis, config.seed
    fed = None
    if config.feedback.enabled:
        fed = palettize_to_outputs(
            target.weight,
            spec,
            target.loss(config.feedback.damping),
            output_axis=axis,
            seed=seed,
        )
    if fed is not None:
        return fed, "error feedback", ""
    note = NO_ORDER if config.feedback.enabled else ""
    if config.blocks.scales:
        plain = palettize_by_columns(
            target.weight, spec, use, target.hessian, output_axis=axis, seed=seed
        )
    else:
        plain = palettize(target.weight, spec, output_axis=axis, seed=seed)
    return plain, "searched", note


# kind of scheme → how its weights are fitted to outputs; others are rounded
_FITS: Mapping[str, Callable[..., _Fit]] = {"quantize": _quantized, "palettize": _palettized}
