"""Turn annotated weights and activations into quantize and dequantize ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx
from typing_extensions import override

from graphopt.analysis.activation_places import places_of
from graphopt.analysis.quantized import quantized_ops
from graphopt.analysis.weights import WeightTensor, find_weights
from graphopt.ir.annotations import (
    ActivationPoint,
    WeightAnnotation,
    annotate_rounding,
    quantization_annotation,
)
from graphopt.ir.captured_module import holder_of, set_tensor
from graphopt.ir.editor import Editor, operands
from graphopt.numerics.affine import QParams, grid_of, has_whole_offsets
from graphopt.passes.annotate_quantization import AnnotateQuantization
from graphopt.passes.insert_fake_quantize import (
    InsertFakeQuantize,
    block_sizes,
    place_behind,
    redirect,
)
from graphopt.passes.pass_base import Pass
from graphopt.prepared import ActivationQuantizer, WeightQuantizer
from graphopt.prepared.findings import findings_of, keep_findings
from graphopt.prepared.state import parts_of
from graphopt.schemes.base import Statistics, StoredWeight
from graphopt.schemes.quantize import Quantization, QuantizedWeight
from graphopt.schemes.rewrite import replace_weight
from graphopt.specs import PerChannelGranularity, QuantizationSpec

__all__ = ["ConvertQuantization", "emit_quantize_dequantize"]

_ops = torch.ops.graphopt
_to_copy = torch.ops.aten._to_copy.default


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
    and after; narrow floats go through `graphopt.round_to_float`, and what is rounded with scales of
    each tensor through `graphopt.round_by_range`.

    Attributes:
        activations: Sharing group → scale and offset, beside those that an earlier pass found; a
            group without either stays in float.
        weights: Name → quantized form; weights without one are quantized here, by the quantizers that
            an earlier stage trained for them or as their specs say.

    Examples:
        >>> from graphopt.passes import AnnotateQuantization
        >>> from graphopt.quantization import QuantizerConfig
        >>> gm = program.graph_module
        >>> for step in (AnnotateQuantization(QuantizerConfig.presets.w8()), ConvertQuantization()):
        ...     _ = step(gm)
        >>> decode = torch.ops.quantized_decomposed.dequantize_per_channel.default
        >>> len(gm.graph.find_nodes(op="call_function", target=decode))
        2
    """

    name: ClassVar[str] = "convert-quantization"
    after: ClassVar[tuple[type[Pass], ...]] = (AnnotateQuantization,)
    tolerance: ClassVar[float | None] = 1e-3
    activations: Mapping[str, QParams] = field(default_factory=dict)
    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)

    @override
    def run(self, edit: Editor) -> None:
        known = self._scales(edit.gm)
        for point, operand, users in places_of(edit.gm):
            scales = known.get(point.group)
            if scales is None and not point.spec.dynamic:
                continue
            readers = set(operand.users)
            if scales is None:
                rounded = _emit_rounding_by_range(edit, operand, point)
            else:
                rounded = emit_quantize_dequantize(edit, operand, point.group, point.spec, scales)
                _remember(rounded, point)
            redirect(edit, operand, rounded, readers, users)
        rows, left = [], dict(findings_of(edit.gm).stored)
        for weight in find_weights(edit.gm):
            annotation = quantization_annotation(weight.nodes[0])
            if annotation is None:
                continue
            quantized = self._quantized(edit.gm, weight, annotation)
            rows.append(replace_weight(edit, weight, quantized, annotation.spec))
            left.pop(weight.name, None)
        keep_findings(edit.gm, scales={}, quantizers={}, stored=left)
        edit.record(rows)

    def _quantized(
        self,
        gm: fx.GraphModule,
        weight: WeightTensor,
        annotation: WeightAnnotation[QuantizationSpec],
    ) -> StoredWeight:
        made = self._made(gm)
        if weight.name in made:
            return made[weight.name]
        trained: WeightQuantizer | None = findings_of(gm).quantizers.get(weight.name)
        if trained is not None:
            return trained.quantized(weight.tensor)
        statistics = Statistics(annotation.output_axis)
        return Quantization().make(weight.tensor, annotation.spec, statistics)

    def _made(self, gm: fx.GraphModule) -> dict[str, StoredWeight]:
        return {**findings_of(gm).stored, **self.weights}

    def _scales(self, gm: fx.GraphModule) -> dict[str, QParams]:
        return {**findings_of(gm).scales, **self.activations}

    @override
    def expected(self, before: fx.GraphModule, after: fx.GraphModule) -> fx.GraphModule:
        """The graph with quantizer modules that round with the same scales."""
        del after
        known, fitted = self._scales(before), self._made(before)
        gm = InsertFakeQuantize()(before).graph_module
        for quantizer in parts_of(gm, ActivationQuantizer):
            scales = known.get(quantizer.origin.name)
            if scales is not None:
                quantizer.hold(*scales)
        for quantizer in parts_of(gm, WeightQuantizer):
            made = fitted.get(quantizer.origin.name)
            if made is not None:
                holder, name = holder_of(gm, quantizer.origin.name)
                set_tensor(holder, name, made.dense())
                quantizer.rounding = False
        return gm


def _remember(rounded: fx.Node, point: ActivationPoint) -> None:
    """Let the ops that round a value know what they are for."""
    node = rounded
    while "quantize_per" not in str(node.target) and node.target is not _ops.round_to_float.default:
        node = operands(node)[0]
    annotate_rounding(node, point)
    if node.target is not _ops.round_to_float.default:
        annotate_rounding(operands(node)[0], point)


def _emit_rounding_by_range(edit: Editor, operand: fx.Node, point: ActivationPoint) -> fx.Node:
    """Emit the rounding of a value with scales of its own, which the derived ones keep."""
    if point.derived:
        return operand
    spec = point.spec
    return edit.call(
        _ops.round_by_range.default,
        operand,
        list(block_sizes(point, operand)),
        grid_of(spec).storage,
        spec.qscheme.value,
        not has_whole_offsets(spec),
        like=operand,
        before=place_behind(operand),
    )


def emit_quantize_dequantize(
    edit: Editor,
    operand: fx.Node,
    group: str,
    spec: QuantizationSpec,
    scales: QParams,
    *,
    before: fx.Node | None = None,
) -> fx.Node:
    """Emit the rounding of a value behind it, or before a given node; returns what to read then."""
    scale, offset = scales
    grid, place = grid_of(spec), before or place_behind(operand)
    dtype = operand.meta["val"].dtype

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return edit.call(target, *args, like=operand, before=place, **kwargs)

    if dtype is torch.float64:
        # the ecosystem's ops round float32 and narrower
        single = call(_to_copy, operand, dtype=torch.float32)
        rounded = emit_quantize_dequantize(edit, single, group, spec, scales, before=before)
        return call(_to_copy, rounded, dtype=torch.float64)
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
