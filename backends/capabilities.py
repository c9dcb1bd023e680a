"""What a target can hold of quantized weights and activations, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from graphopt.analysis.quantized import find_quantized_activations
from graphopt.analysis.stored_values import find_quantized_weights
from graphopt.specs.storage import PowerScales, StorageRules

__all__ = ["Capabilities", "ComplexNumbers", "quantization_refusals"]

ComplexNumbers = Literal["all", "transforms", "none"]


@dataclass(frozen=True)
class Capabilities:
    """What a target can hold; refusals quote it and searches read their candidates from it.

    Attributes:
        index_bits: Widths of indices that the target stores as such.
        padded_bits: Width → stored width of those it holds exactly in a wider form.
        grouped: Whether a tensor may have several tables.
        vector: Whether table entries may be longer than one.
        lut_dtypes: Element types of tables.
        channel_scale: Whether a scale may follow the lookup.
        sparse: Whether there is an op for sparse outliers.
        weight_types: Element types of quantized weights, by `shift_scale`'s names; () for none.
        table_types: Element types that are stored as lookups of int8 entries, exactly.
        weight_blocks: Whether scales may run over blocks, not only over channels.
        minimum: Whether quantized weights may have a float minimum (MINVAL).
        activation_types: Element types of activations.
        activation_channels: Whether activations may have one scale per channel.
        dynamic_floats: Whether scales of narrow float activations may be computed at run time, as those
            of integers may everywhere.
        fused_activations: Activation functions that are computed together with the quantized op
            before them; None for all.
        integer_results: Whether an op with a weight computes with integers only where its result is
            rounded as well.
        float_ops: Names of ops that are computed in float, whatever they read, unless that is a
            stored weight.
        lacks: Float types that the target does not compute in; float32 takes their place.
        complex_numbers: Which ones it computes with: all, those that come from Fourier transforms of real
            values, or none; real and imaginary parts take the place of others.
        power_scales: Weights whose e8m0 scales are stored in a byte: all, narrow floats, or none.
        bfloat16_scales: Whether scales in bfloat16 are stored as such.

    Examples:
        >>> from graphopt.backends import load_backend
        >>> load_backend("coreai").capabilities.stored_bits(3)
        4
    """

    index_bits: tuple[int, ...]
    padded_bits: tuple[tuple[int, int], ...] = ()
    grouped: bool = True
    vector: bool = True
    lut_dtypes: tuple[str, ...] = ("float32", "float16")
    channel_scale: bool = True
    sparse: bool = True
    weight_types: tuple[str, ...] = ()
    table_types: tuple[str, ...] = ()
    weight_blocks: bool = True
    minimum: bool = True
    activation_types: tuple[str, ...] = ()
    activation_channels: bool = True
    dynamic_floats: bool = False
    fused_activations: frozenset[str] | None = None
    integer_results: bool = False
    float_ops: frozenset[str] = frozenset()
    lacks: frozenset[torch.dtype] = frozenset()
    complex_numbers: ComplexNumbers = "all"
    power_scales: PowerScales = "none"
    bfloat16_scales: bool = True

    @property
    def storage(self) -> StorageRules:
        """What decides the sizes of weights."""
        return StorageRules(
            self.index_bits,
            self.padded_bits,
            self.table_types,
            power_scales=self.power_scales,
            bfloat16_scales=self.bfloat16_scales,
        )

    def stored_bits(self, n_bits: int) -> int | None:
        """Width that an index of `n_bits` takes in the target, None where it cannot hold it."""
        return self.storage.code_bits(n_bits)


def quantization_refusals(gm: fx.GraphModule, allowed: Capabilities) -> list[str]:
    """Why a target cannot hold a graph's quantized weights and activations."""
    reasons = []
    for weight in find_quantized_weights(gm):
        known = (*allowed.weight_types, *allowed.table_types)
        if weight.storage not in known:
            reasons.append(f"{weight.name}: {weight.storage} weights; use one of {known}")
        elif not allowed.weight_blocks and not weight.per_channel:
            reasons.append(
                f"{weight.name}: scales over blocks; use PerChannelGranularity() or"
                " PerTensorGranularity()"
            )
        elif weight.offset == "minimum" and (
            not allowed.minimum or weight.storage in allowed.table_types
        ):
            reasons.append(
                f"{weight.name}: {weight.storage} with a float minimum; use qformulation 'zp'"
            )
        if weight.storage == "fp4_e2m1" and weight.shape[-1] % 2:
            reasons.append(f"{weight.name}: fp4 needs an even last axis, it has {weight.shape[-1]}")
    for activation in find_quantized_activations(gm):
        if activation.dynamic:
            if activation.storage.startswith("fp") and not allowed.dynamic_floats:
                reasons.append(
                    f"{activation.name}: scales of {activation.storage} that are computed at run time;"
                    " use an integer type, or another qparam_calculator_cls than 'dynamic' and data"
                )
            continue
        if activation.storage not in allowed.activation_types:
            reasons.append(
                f"{activation.name}: {activation.storage} activations; use one of"
                f" {allowed.activation_types}"
            )
        if activation.per_channel and not allowed.activation_channels:
            reasons.append(
                f"{activation.name}: one scale per channel; use PerTensorGranularity() for activations"
            )
    return reasons
