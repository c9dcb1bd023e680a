"""Turn annotated weights and activations into quantize and dequantize ops."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.analysis.activation_places import places_of
from graphopt.analysis.quantized import quantized_ops
from graphopt.analysis.weights import WeightTensor, find_weights, identity_of
from graphopt.ir.annotations import (
    WeightAnnotation,
    findings_of,
    keep_findings,
    quantization_annotation,
)
from graphopt.ir.captured_module import holder_of, set_tensor
from graphopt.ir.editor import Editor
from graphopt.ir.records import TensorRecord
from graphopt.numerics.affine import grid_of, has_whole_offsets
from graphopt.passes.annotate_quantization import AnnotateQuantization
from graphopt.passes.insert_fake_quantize import (
    InsertFakeQuantize,
    place_behind,
    redirect,
)
from graphopt.passes.pass_base import Pass
from graphopt.passes.sparse_records import of_whole_weight
from graphopt.prepared import ActivationQuantizer, WeightQuantizer
from graphopt.prepared.state import parts_of
from graphopt.schemes.quantize import QuantizedWeight, plan_blocks, quantize_weight
from graphopt.specs import PerChannelGranularity, QuantizationSpec

__all__ = ["ConvertQuantization", "Scales", "emit_rounding", "emit_weight", "record_of"]

_ops = torch.ops.graphopt
Scales = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class ConvertQuantization(Pass):
    """Replace annotated weights by their stored form, and round annotated activations.

    Before:
        %y = conv2d(%x, %w, %b)

    After:
        %q = quantized_decomposed.quantize_per_tensor(%x, scale, zero_point, q_min, q_max, int8)
        %d = quantized_decomposed.dequantize_per_tensor(%q, scale, zero_point, q_min, q_max, int8)
        %w = quantized_decomposed.dequantize_per_channel(%w_int8, %scales, %zero_points, axis, …)
        %y = conv2d(%d, %w, %b)

    int8 weights with one scale, or one per channel, take the form that other tools know; all others
    go through `graphopt.shift_scale`. Activations with a float minimum (MINVAL) are shifted before
    and after; narrow floats go through `graphopt.round_to_float`.

    Attributes:
        activations: Sharing group → scale and offset, beside those that an earlier pass found; a
            group without either stays in float.
        weights: Name → quantized form; weights without one are quantized here, by the quantizers that
            an earlier stage trained for them or as their specs say.
    """

    name: ClassVar[str] = "convert-quantization"
    after: ClassVar[tuple[type[Pass], ...]] = (AnnotateQuantization,)
    tolerance: ClassVar[float | None] = 1e-3
    activations: Mapping[str, Scales] = field(default_factory=dict)
    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)

    @override
    def run(self, edit: Editor) -> None:
        known = self._scales(edit.gm)
        for point, operand, users in places_of(edit.gm):
            scales = known.get(point.group)
            if scales is not None:
                readers = set(operand.users)
                rounded = emit_rounding(edit, operand, point.group, point.spec, scales)
                redirect(edit, operand, rounded, readers, users)
        rows = []
        for weight in find_weights(edit.gm):
            annotation = quantization_annotation(weight.nodes[0])
            if annotation is None:
                continue
            quantized = self._quantized(edit.gm, weight, annotation)
            row = record_of(weight, annotation.spec, quantized)
            rows.append(of_whole_weight(edit.gm, weight, row))
            dense = emit_weight(edit, weight.name, quantized, weight.nodes[0])
            for node in weight.nodes:
                edit.replace(node, dense)
            for path in (weight.name, *weight.aliases):
                edit.delete_constant(path)
        keep_findings(edit.gm, scales={}, quantizers={})
        edit.record(rows)

    def _quantized(
        self,
        gm: fx.GraphModule,
        weight: WeightTensor,
        annotation: WeightAnnotation[QuantizationSpec],
    ) -> QuantizedWeight:
        if weight.name in self.weights:
            return self.weights[weight.name]
        trained: WeightQuantizer | None = findings_of(gm).quantizers.get(weight.name)
        if trained is not None:
            return trained.quantized(weight.tensor)
        return _quantize(weight, annotation)

    def _scales(self, gm: fx.GraphModule) -> dict[str, Scales]:
        return {**findings_of(gm).scales, **self.activations}

    @override
    def expected(self, before: fx.GraphModule, after: fx.GraphModule) -> fx.GraphModule:
        """The graph with quantizer modules that round with the same scales."""
        del after
        known = self._scales(before)
        gm = InsertFakeQuantize()(before).graph_module
        for quantizer in parts_of(gm, ActivationQuantizer):
            scales = known.get(quantizer.origin.name)
            if scales is not None:
                quantizer.hold(*scales)
        for quantizer in parts_of(gm, WeightQuantizer):
            made = self.weights.get(quantizer.origin.name)
            if made is not None:
                holder, name = holder_of(gm, quantizer.origin.name)
                set_tensor(holder, name, made.dense())
                quantizer.rounding = False
        return gm


def _quantize(
    weight: WeightTensor, annotation: WeightAnnotation[QuantizationSpec]
) -> QuantizedWeight:
    spec = annotation.spec
    blocks, _ = plan_blocks(weight.tensor.shape, annotation.output_axis, spec.granularity)
    return quantize_weight(weight.tensor, spec, blocks)


def emit_rounding(
    edit: Editor,
    operand: fx.Node,
    group: str,
    spec: QuantizationSpec,
    scales: Scales,
    *,
    before: fx.Node | None = None,
) -> fx.Node:
    """Emit the rounding of a value behind it, or before a given node; returns what to read then."""
    scale, offset = scales
    grid, place = grid_of(spec), before or place_behind(operand)
    dtype = operand.meta["val"].dtype

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return edit.call(target, *args, like=operand, before=place, **kwargs)

    if grid.is_float:
        return call(_ops.round_to_float.default, operand, float(scale), grid.storage)
    ops = quantized_ops()
    container = torch.uint8 if grid.q_min == 0 else torch.int8
    limits = (int(grid.q_min), int(grid.q_max), container)
    out = {} if dtype == torch.float32 else {"out_dtype": dtype}
    granularity = spec.granularity
    if isinstance(granularity, PerChannelGranularity):
        zeros = torch.zeros_like(scale) if offset is None else offset
        factors = edit.constant(f"{group}_scale", scale, like=operand, before=place)
        zero = edit.constant(
            f"{group}_zero_point", zeros.to(torch.int64), like=operand, before=place
        )
        axis = int(granularity.axis or 0) % operand.meta["val"].ndim
        stored = call(ops.quantize_per_channel.default, operand, factors, zero, axis, *limits)
        return call(ops.dequantize_per_channel.default, stored, factors, zero, axis, *limits, **out)
    step = float(scale)
    shift = 0.0 if offset is None else float(offset)
    if has_whole_offsets(spec):
        around = (step, int(shift), *limits)
        stored = call(ops.quantize_per_tensor.default, operand, *around)
        return call(ops.dequantize_per_tensor.default, stored, *around, **out)
    # scale · (q − q_min) + minimum
    minimum = step * (grid.q_min - shift)
    around = (step, int(grid.q_min), *limits)
    moved = call(torch.ops.aten.sub.Tensor, operand, minimum)
    stored = call(ops.quantize_per_tensor.default, moved, *around)
    back = call(ops.dequantize_per_tensor.default, stored, *around, **out)
    return call(torch.ops.aten.add.Tensor, back, minimum)


def emit_weight(
    edit: Editor,
    name: str,
    weight: QuantizedWeight,
    like: fx.Node,
    *,
    before: fx.Node | None = None,
) -> fx.Node:
    """Emit a weight's stored form and the op that gives its dense values.

    Args:
        edit: The editor.
        name: The weight's name, from which its constants get theirs.
        weight: The stored form.
        like: Node whose origin the new ones take, and their place when `before` is None.
        before: Node in front of which they stand.
    """
    counts, shape = weight.blocks.counts, list(weight.blocks.shape)
    place: dict[str, Any] = {"like": like, "before": before}
    axes = [axis for axis, count in enumerate(counts) if count > 1]
    per_channel = len(axes) == 1 and counts[axes[0]] == shape[axes[0]]
    plain = weight.storage in ("int8", "uint8") and weight.dtype == torch.float32
    whole = weight.offset is None or not weight.offset.is_floating_point()
    if plain and whole and (not axes or per_channel) and weight.scale.dtype == torch.float32:
        return _plain(edit, name, weight, axes, place)
    data = edit.constant(f"{name}_quantized", weight.data, **place)
    scale = edit.constant(f"{name}_scale", weight.scale, **place)
    offset = None
    if weight.offset is not None:
        offset = edit.constant(f"{name}_offset", weight.offset, **place)
    return edit.call(
        _ops.shift_scale.default,
        data,
        scale,
        offset,
        weight.storage,
        shape,
        weight.dtype,
        **place,
    )


def _plain(
    edit: Editor, name: str, weight: QuantizedWeight, axes: list[int], place: dict[str, Any]
) -> fx.Node:
    ops = quantized_ops()
    container = torch.int8 if weight.storage == "int8" else torch.uint8
    data = weight.data.view(container).reshape(weight.blocks.shape)
    low, high = (-128, 127) if container == torch.int8 else (0, 255)
    stored = edit.constant(f"{name}_quantized", data, **place)
    if not axes:
        zero = 0 if weight.offset is None else int(weight.offset)
        step = float(weight.scale)
        return edit.call(
            ops.dequantize_per_tensor.default, stored, step, zero, low, high, container, **place
        )
    zeros = torch.zeros(weight.scale.numel(), dtype=torch.int64)
    if weight.offset is not None:
        zeros = weight.offset.reshape(-1).to(torch.int64)
    factors = edit.constant(f"{name}_scale", weight.scale.reshape(-1), **place)
    zero_points = edit.constant(f"{name}_zero_point", zeros, **place)
    return edit.call(
        ops.dequantize_per_channel.default,
        stored,
        factors,
        zero_points,
        axes[0],
        low,
        high,
        container,
        **place,
    )


def record_of(
    weight: WeightTensor, spec: QuantizationSpec, quantized: QuantizedWeight
) -> TensorRecord:
    """The table's row of a quantized weight."""
    blocks = quantized.blocks
    detail = f"{quantized.storage} {spec.qscheme.value}, "
    sizes = [size // count for size, count in zip(blocks.shape, blocks.counts, strict=True)]
    if blocks.n_blocks == 1:
        detail += "one scale"
    else:
        detail += f"{blocks.n_blocks} scales over blocks of {'×'.join(map(str, sizes))}"
    energy, sse = quantized.energy, quantized.sse
    snr = None if energy <= 0 else math.inf if sse <= 0 else 10 * math.log10(energy / sse)
    return TensorRecord(
        **identity_of(weight),
        status="quantized",
        detail=detail,
        n_bits=grid_of(spec).bits,
        stored_bits=quantized.stored_bits(),
        snr_db=snr,
    )
