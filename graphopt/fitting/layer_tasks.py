"""Fits of one layer as tasks: what they need travels, and no graph with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from graphopt.analysis.matrix_form import LooseUse
from graphopt.fitting.layer_data import LayerData
from graphopt.fitting.layer_target import LayerTarget
from graphopt.fitting.moments import Sample
from graphopt.fitting.palettize_outputs import (
    NO_ORDER,
    palettize_by_columns,
    palettize_to_outputs,
)
from graphopt.fitting.quantize_outputs import needs_little, quantize_to_outputs
from graphopt.numerics.device import computing_on
from graphopt.run.workers import Task
from graphopt.schemes.base import StoredWeight
from graphopt.schemes.palettize import PalettizedWeight, palettize
from graphopt.schemes.quantize import QuantizedWeight, plan_blocks, quantize_weight
from graphopt.specs import PalettizationSpec, QuantizationSpec
from graphopt.specs.model import SpecModel

__all__ = ["CROSSING", "UNREACHED", "Found", "Layer", "fit_integers_of", "fit_tables_of", "task_of"]

SpecT = TypeVar("SpecT", bound=SpecModel)
StoredT = TypeVar("StoredT", bound=StoredWeight)
# for layers of which `needs_little` is true
_FEW_POSITIONS, _FEW_PER_COLUMN = 4_096, 4
UNREACHED = "calibration never reached it"
CROSSING = "its blocks cross rows"


@dataclass(frozen=True)
class Layer(Generic[SpecT]):
    """What a fit knows of a layer besides its tensors.

    Attributes:
        use: How its op reads the weight.
        spec: What the weight becomes.
        output_axis: Output-channel axis of the stored tensor.
        seed: Seed of the sample of positions, and of vector tables.
        device: Where its arithmetic runs, as for `computing_on`.
    """

    use: LooseUse
    spec: SpecT
    output_axis: int
    seed: int
    device: str | None = None


@dataclass(frozen=True)
class Found(Generic[StoredT]):
    """What a fit gives.

    Attributes:
        stored: The weight's form.
        bias: The bias of least mean error, where there is one that may move.
        fallback: Why errors were not fed back, or "".
    """

    stored: StoredT
    bias: Tensor | None = None
    fallback: str = ""


def task_of(layer: Layer[Any], weight: Tensor, bias: Tensor | None, data: LayerData) -> Task:
    """The fit of one layer, for `fit_tables_of` and `fit_integers_of`.

    Args:
        layer: What is known of it.
        weight: The stored tensor.
        bias: The bias that takes up the mean error, or None.
        data: What goes in and what should have gone in.
    """
    biased = {} if bias is None else {"bias": bias}
    return Task((layer,), {"weight": weight, **biased, **data.tensors()})


def _target(tensors: Mapping[str, Tensor], layer: Layer[Any], sample: Sample) -> LayerTarget | None:
    data, centred = LayerData.read(tensors), "bias" in tensors
    moments = data.moments(layer.use, centred=centred, sample=sample)
    return None if moments is None else LayerTarget.of(layer.use, tensors["weight"], moments)


def _bias(
    tensors: Mapping[str, Tensor], target: LayerTarget, stored: StoredWeight
) -> Tensor | None:
    return target.bias(tensors["bias"], stored.dense()) if "bias" in tensors else None


def fit_tables_of(
    tensors: Mapping[str, Tensor], layer: Layer[PalettizationSpec]
) -> Found[PalettizedWeight]:
    """Tables and codes of one layer.

    Args:
        tensors: Those of `task_of`.
        layer: What is known of it; its spec is one of palettes.
    """
    with computing_on(layer.device):
        return _tables(tensors, layer)


def _tables(
    tensors: Mapping[str, Tensor], layer: Layer[PalettizationSpec]
) -> Found[PalettizedWeight]:
    weight, spec, axis, seed = tensors["weight"], layer.spec, layer.output_axis, layer.seed
    target = _target(tensors, layer, Sample(seed))
    if target is None:
        return Found(palettize(weight, spec, output_axis=axis, seed=seed), None, UNREACHED)
    loss = target.loss()
    stored = palettize_to_outputs(target.weight, spec, loss, output_axis=axis, seed=seed)
    reason = "" if stored is not None else NO_ORDER
    if stored is None:
        stored = palettize_by_columns(
            weight, spec, layer.use, target.hessian, output_axis=axis, seed=seed
        )
    return Found(stored, _bias(tensors, target, stored), reason)


def fit_integers_of(
    tensors: Mapping[str, Tensor], layer: Layer[QuantizationSpec]
) -> Found[QuantizedWeight]:
    """Elements and scales of one layer.

    Args:
        tensors: Those of `task_of`.
        layer: What is known of it; its spec is one of quantized weights.
    """
    with computing_on(layer.device):
        return _integers(tensors, layer)


def _sample(layer: Layer[QuantizationSpec]) -> Sample:
    if needs_little(layer.spec, layer.use):
        return Sample(layer.seed, _FEW_POSITIONS, _FEW_PER_COLUMN)
    return Sample(layer.seed)


def _integers(
    tensors: Mapping[str, Tensor], layer: Layer[QuantizationSpec]
) -> Found[QuantizedWeight]:
    weight, spec = tensors["weight"], layer.spec
    blocks, _ = plan_blocks(weight.shape, layer.output_axis, spec.granularity)
    target = _target(tensors, layer, _sample(layer))
    stored = None
    if target is not None:
        stored = quantize_to_outputs(target.weight, spec, blocks, target.loss())
    if target is None or stored is None:
        reason = UNREACHED if target is None else CROSSING
        return Found(quantize_weight(weight, spec, blocks), None, reason)
    return Found(stored.measured(weight), _bias(tensors, target, stored), "")
