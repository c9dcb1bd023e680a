"""What passes with data found out for those that rewrite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypedDict

from torch import Tensor, fx
from typing_extensions import Unpack

from graphopt.ir.annotations import hand_on, handed_on
from graphopt.ir.captured_module import CapturedModule
from graphopt.prepared.weight import WeightQuantizer
from graphopt.schemes.palette import PalettizedWeight
from graphopt.schemes.quantize import QuantizedWeight

__all__ = ["Findings", "findings_of", "keep_findings"]

Scales = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Findings:
    """What passes with data found out for those that rewrite.

    Attributes:
        palettes: Name of a weight → its stored form.
        sensitivities: Name of a weight → weight of each element's squared error.
        masks: Name of a weight → where its elements stay.
        prepared: The graph with quantizers that have observed its activations.
        scales: Sharing group of activations → scale and offset.
        quantizers: Name of a weight → the quantizer that was trained for it.
        integers: Name of a weight → its quantized form.
        reference: The graph before compression.
        fitted_to_outputs: Whether every palette was fitted to the outputs of its layer.
    """

    palettes: Mapping[str, PalettizedWeight] = field(default_factory=dict)
    sensitivities: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    prepared: CapturedModule | None = None
    scales: Mapping[str, Scales] = field(default_factory=dict)
    quantizers: Mapping[str, WeightQuantizer] = field(default_factory=dict)
    integers: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    reference: fx.GraphModule | None = None
    fitted_to_outputs: bool = False


class _Fields(TypedDict, total=False):
    palettes: Mapping[str, PalettizedWeight]
    sensitivities: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    prepared: CapturedModule | None
    scales: Mapping[str, Scales]
    quantizers: Mapping[str, WeightQuantizer]
    integers: Mapping[str, QuantizedWeight]
    reference: fx.GraphModule | None
    fitted_to_outputs: bool


def findings_of(gm: fx.GraphModule) -> Findings:
    """What earlier passes left for later ones."""
    findings = handed_on(gm)
    return findings if isinstance(findings, Findings) else Findings()


def keep_findings(gm: fx.GraphModule, **fields: Unpack[_Fields]) -> None:
    """Leave something for later passes, beside what is there."""
    hand_on(gm, replace(findings_of(gm), **fields))
