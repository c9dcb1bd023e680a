"""What passes with data found out for those that rewrite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypedDict, cast

from torch import Tensor, fx
from typing_extensions import Unpack

from graphopt.ir.annotations import hand_on, handed_on
from graphopt.ir.captured_module import CapturedModule
from graphopt.numerics.affine import QParams
from graphopt.prepared.state import parts_of
from graphopt.prepared.weight import WeightQuantizer
from graphopt.schemes.base import StoredWeight
from graphopt.schemes.quantize import QuantizedWeight

__all__ = ["Findings", "FindingsKeywords", "findings_of", "hold_stored", "keep_findings"]


@dataclass(frozen=True)
class Findings:
    """What passes with data found out for those that rewrite.

    Attributes:
        stored: Name of a weight → the form that it takes.
        sensitivities: Name of a weight → weight of each element's squared error.
        masks: Name of a weight → where its elements stay.
        prepared: The graph with quantizers that have observed its activations.
        scales: Sharing group of activations → scale and offset.
        quantizers: Name of a weight → the quantizer that was trained for it.
        reference: The graph before compression.
        fitted_to_outputs: Whether every palette was fitted to the outputs of its layer.
    """

    stored: Mapping[str, StoredWeight] = field(default_factory=dict)
    sensitivities: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    prepared: CapturedModule | None = None
    scales: Mapping[str, QParams] = field(default_factory=dict)
    quantizers: Mapping[str, WeightQuantizer] = field(default_factory=dict)
    reference: fx.GraphModule | None = None
    fitted_to_outputs: bool = False


class FindingsKeywords(TypedDict, total=False):
    """The fields of `Findings` as keywords of a call."""

    stored: Mapping[str, StoredWeight]
    sensitivities: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    prepared: CapturedModule | None
    scales: Mapping[str, QParams]
    quantizers: Mapping[str, WeightQuantizer]
    reference: fx.GraphModule | None
    fitted_to_outputs: bool


def findings_of(gm: fx.GraphModule) -> Findings:
    """What earlier passes left for later ones."""
    findings = handed_on(gm)
    return findings if isinstance(findings, Findings) else Findings()


def keep_findings(gm: fx.GraphModule, **fields: Unpack[FindingsKeywords]) -> None:
    """Leave something for later passes, beside what is there."""
    hand_on(gm, replace(findings_of(gm), **fields))


def hold_stored(prepared: CapturedModule, annotated: CapturedModule) -> None:
    """Let the quantizers of a prepared graph give the forms that were found for their weights.

    Args:
        prepared: A graph with quantizers.
        annotated: What it was made of: its weights as they are, and the findings.
    """
    stored = findings_of(annotated).stored
    weights = dict(annotated.named_buffers(remove_duplicate=False))
    weights |= dict(annotated.named_parameters(remove_duplicate=False))
    for part in parts_of(prepared, WeightQuantizer):
        name = part.origin.name
        if name in stored and name in weights:
            part.hold(cast("QuantizedWeight", stored[name]), weights[name].detach())
