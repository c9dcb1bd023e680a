"""One layer fitted to its target under a spec, whatever its scheme; for searches that try many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from graphopt.fitting.layer_target import LayerTarget
from graphopt.fitting.palettize_outputs import (
    NO_ORDER,
    palettize_by_columns,
    palettize_to_outputs,
)
from graphopt.fitting.quantize_outputs import quantize_to_outputs, search_scales
from graphopt.fitting.scales_by_rate import scales_by_rate
from graphopt.numerics.affine import QParams, grid_of
from graphopt.schemes.base import StoredWeight
from graphopt.schemes.palettize import Palettization, palettize
from graphopt.schemes.quantize import Quantization, plan_blocks, quantize_weight
from graphopt.schemes.registry import scheme_of
from graphopt.specs import PalettizationSpec, QuantizationSpec
from graphopt.specs.model import SpecModel

__all__ = ["TargetFit", "TargetOptions", "fit_to_target"]


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """How a layer is fitted.

    Attributes:
        output_axis: Output-channel axis of the stored tensor.
        search_scales: Search scales and tables for the least error at the outputs; False takes those
            of the weight.
        feedback: Feed the error of each column on to the later ones.
        damping: Share of the mean diagonal that is added to the Hessian.
        rate_weight: λ, loss per bit of an entropy coder, by which scales are searched; None counts no
            bits.
        importance: What a squared error of each output row costs, [rows], beside `rate_weight`.
        seed: Seed of vector tables.
    """

    output_axis: int = 0
    search_scales: bool = True
    feedback: bool = True
    damping: float = 0.01
    rate_weight: float | None = None
    importance: Tensor | None = None
    seed: int = 0


class TargetFit(NamedTuple):
    """A layer's form.

    Attributes:
        stored: The form.
        how: "rounded", "searched" or "error feedback".
        note: Why something was not done, or "".
    """

    stored: StoredWeight
    how: str
    note: str = ""


def fit_to_target(spec: SpecModel, target: LayerTarget, options: TargetOptions) -> TargetFit | None:
    """The form of least error at a layer's outputs; None where its scheme has nothing to fit.

    Args:
        spec: What the weight becomes.
        target: What to aim at.
        options: How.

    Raises:
        CompressionError: The weight contains NaN or Inf, or the spec does not fit its shape.
    """
    fit = _FITS.get(scheme_of(spec).kind)
    return None if fit is None else fit(spec, target, options)


def _quantized(spec: QuantizationSpec, target: LayerTarget, options: TargetOptions) -> TargetFit:
    weight = target.weight
    blocks, _ = plan_blocks(weight.shape, options.output_axis, spec.granularity)
    scales: QParams
    if not options.search_scales:
        plain = quantize_weight(weight, spec, blocks)
        scales = plain.scale.float(), None if plain.offset is None else plain.offset.float()
    elif options.rate_weight is None or grid_of(spec).is_float:
        scales = search_scales(weight, spec, blocks, target.use, target.hessian)
    else:
        scales = scales_by_rate(
            weight,
            spec,
            blocks,
            target.use,
            target.hessian,
            options.rate_weight,
            options.importance,
        )
    if not options.feedback:
        rounded = quantize_weight(weight, spec, blocks, fixed=scales)
        return TargetFit(rounded, "searched" if options.search_scales else "rounded")
    fed = quantize_to_outputs(
        weight,
        spec,
        blocks,
        target.loss(options.damping),
        scales=scales,
        move_scales=options.search_scales,
    )
    if fed is None:
        rounded = quantize_weight(weight, spec, blocks, fixed=scales)
        note = "its blocks do not follow the rows and columns of its matrix"
        return TargetFit(rounded, "searched", note)
    return TargetFit(fed, "error feedback")


def _palettized(spec: PalettizationSpec, target: LayerTarget, options: TargetOptions) -> TargetFit:
    axis, seed = options.output_axis, options.seed
    fed = None
    if options.feedback:
        loss = target.loss(options.damping)
        fed = palettize_to_outputs(target.weight, spec, loss, output_axis=axis, seed=seed)
    if fed is not None:
        return TargetFit(fed, "error feedback")
    note = NO_ORDER if options.feedback else ""
    if options.search_scales:
        plain = palettize_by_columns(
            target.weight, spec, target.use, target.hessian, output_axis=axis, seed=seed
        )
    else:
        plain = palettize(target.weight, spec, output_axis=axis, seed=seed)
    return TargetFit(plain, "searched", note)


# kind of scheme → how its weights are fitted to outputs
_FITS: Mapping[str, Callable[[Any, LayerTarget, TargetOptions], TargetFit]] = {
    Quantization.kind: _quantized,
    Palettization.kind: _palettized,
}
