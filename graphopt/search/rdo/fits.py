"""One layer in one candidate's form: searched, fed back, or rounded to the nearest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from graphopt.analysis.matrix_form import WeightUse
from graphopt.analysis.weights import WeightTensor
from graphopt.fitting.layer_target import LayerTarget
from graphopt.fitting.moments import bias_of, collect_moments
from graphopt.fitting.palettize_outputs import (
    NO_ORDER,
    palettize_by_columns,
    palettize_to_outputs,
)
from graphopt.fitting.quantize_outputs import quantize_to_outputs, search_scales
from graphopt.ir.editor import Editor
from graphopt.numerics.affine import grid_of
from graphopt.schemes.base import Statistics, StoredWeight
from graphopt.schemes.palettize import palettize
from graphopt.schemes.quantize import plan_blocks, quantize_weight
from graphopt.schemes.registry import scheme_of
from graphopt.search.mixed_precision.candidates import Candidate
from graphopt.search.mixed_precision.layers import Layer
from graphopt.search.rdo.config import RDOConfig
from graphopt.search.rdo.rate import scales_by_rate
from graphopt.specs import PalettizationSpec, QuantizationSpec

__all__ = ["Fitted", "LayerSite", "fit_layer", "take_target"]

_Fit = tuple[StoredWeight, str, str]  # form, how it was found, why something was not done
_NO_FEEDBACK = "no error feedback for lookups, tied weights and ops of other forms"


@dataclass(frozen=True)
class LayerSite:
    """A layer in the graph.

    Attributes:
        layer: Its name, candidates and sizes.
        weight: Its tensor and nodes.
        use: The one op that reads it in a known form; None where it has none, or several.
        bias: The constant that takes up the mean of its error, or None.
        bias_value: Its value in the exact program.
    """

    layer: Layer
    weight: WeightTensor
    use: WeightUse | None
    bias: fx.Node | None
    bias_value: Tensor | None

    @classmethod
    def of(
        cls,
        layer: Layer,
        weight: WeightTensor,
        use: WeightUse | None,
        edit: Editor,
        config: RDOConfig,
    ) -> LayerSite:
        """A layer under the options of a config."""
        bias = bias_of(use) if use is not None and config.feedback.compensate else None
        value = None if bias is None else edit.value(bias).detach()
        return cls(layer, weight, use, bias, value)


@dataclass(frozen=True)
class Fitted:
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
    site: LayerSite,
    inputs: Sequence[Tensor],
    exact: Sequence[Tensor],
    saliency: Sequence[Tensor] | None,
    missing: Sequence[tuple[Tensor, Tensor]] | None,
    config: RDOConfig,
) -> LayerTarget:
    """Reduce a layer's inputs to what its fits need.

    Args:
        site: The layer, with a use other than a lookup.
        inputs: What it reads for each batch.
        exact: What it would read in the exact program.
        saliency: Per batch [batch, positions], or None.
        missing: The other operand of the sum behind it, exact and as it is.
        config: Options.
    """
    assert site.use is not None
    moments = collect_moments(
        site.use,
        inputs,
        exact,
        saliency,
        missing if config.feedback.compensate else None,
        centred=site.bias is not None,
        seed=config.seed,
    )
    feedback = config.feedback
    return LayerTarget.of(
        site.use,
        site.weight.tensor.detach(),
        moments,
        compensate=feedback.compensate,
        damping=feedback.damping if feedback.enabled else None,
    )


def fit_layer(
    site: LayerSite,
    candidate: Candidate,
    given: LayerTarget | None,
    config: RDOConfig,
    rate_weight: float,
    importance: Tensor | None,
) -> Fitted:
    """The best form of a layer under one candidate.

    Args:
        site: The layer.
        candidate: What it becomes.
        given: From `take_target`; None fits the weight alone.
        config: Options.
        rate_weight: λ, for rate "entropy".
        importance: What a squared error of each output row costs, [rows], for rate "entropy".

    Raises:
        CompressionError: The weight contains NaN or Inf, or the candidate does not fit its shape.
    """
    spec = candidate.weight
    if spec is None:
        numel = site.weight.tensor.numel() * site.weight.tensor.element_size() * 8
        return Fitted(candidate.name, None, None, "kept", numel)
    weight = site.weight.tensor.detach()
    scheme = scheme_of(spec)
    stored: StoredWeight
    fit = _FITS.get(scheme.kind)
    if given is None or site.use is None or fit is None:
        known = Statistics(site.layer.output_axis, seed=config.seed)
        stored, how, note = scheme.make(weight, spec, known), "rounded", _NO_FEEDBACK
    else:
        stored, how, note = fit(site, site.use, spec, given, config, rate_weight, importance)
    bias = None
    if site.bias_value is not None and site.use is not None and given is not None:
        bias = given.bias(site.bias_value, stored.dense())
    coded = stored.coded_bits()
    return Fitted(candidate.name, stored.measured(weight), bias, how, coded, note)


def _quantized(
    site: LayerSite,
    use: WeightUse,
    spec: QuantizationSpec,
    given: LayerTarget,
    config: RDOConfig,
    rate_weight: float,
    importance: Tensor | None,
) -> _Fit:
    weight = given.weight
    blocks, _ = plan_blocks(weight.shape, site.layer.output_axis, spec.granularity)
    scales = None
    if config.blocks.scales and config.rate == "entropy" and not grid_of(spec).is_float:
        scales = scales_by_rate(weight, spec, blocks, use, given.hessian, rate_weight, importance)
    elif config.blocks.scales:
        scales = search_scales(weight, spec, blocks, use, given.hessian)
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
        use,
        given.hessian,
        scales=scales,
        move_scales=config.blocks.scales,
        damping=config.feedback.damping,
        ordered=given.ordered,
    )
    if fed is None:
        rounded = quantize_weight(weight, spec, blocks, fixed=scales)
        return rounded, "searched", "its blocks do not follow the rows and columns of its matrix"
    return fed, "error feedback", ""


def _palettized(
    site: LayerSite,
    use: WeightUse,
    spec: PalettizationSpec,
    given: LayerTarget,
    config: RDOConfig,
    rate_weight: float,
    importance: Tensor | None,
) -> _Fit:
    del rate_weight, importance
    axis, seed = site.layer.output_axis, config.seed
    fed = None
    if config.feedback.enabled:
        fed = palettize_to_outputs(
            given.weight,
            spec,
            use,
            given.hessian,
            output_axis=axis,
            damping=config.feedback.damping,
            ordered=given.ordered,
            seed=seed,
        )
    if fed is not None:
        return fed, "error feedback", ""
    note = NO_ORDER if config.feedback.enabled else ""
    if config.blocks.scales:
        plain = palettize_by_columns(
            given.weight, spec, use, given.hessian, output_axis=axis, seed=seed
        )
    else:
        plain = palettize(given.weight, spec, output_axis=axis, seed=seed)
    return plain, "searched", note


# kind of scheme → how its weights are fitted to outputs; others are rounded
_FITS: Mapping[str, Callable[..., _Fit]] = {"quantize": _quantized, "palettize": _palettized}
