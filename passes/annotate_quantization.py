"""Decide what a quantization config makes of every weight and every activation."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import fx
from typing_extensions import override

from graphopt.analysis.quantization_plan import ActivationPlan, plan_activations
from graphopt.analysis.select_weights import (
    FLOAT_DTYPES,
    decide,
    report_unmatched,
    skipped_row,
    touch_modules,
)
from graphopt.analysis.weights import WeightTensor, find_weights
from graphopt.config.quantization import QuantizerConfig
from graphopt.config.selection import Selector
from graphopt.errors import CompressionError, ConfigWarning
from graphopt.ir import op_info
from graphopt.ir.annotations import (
    WeightAnnotation,
    annotate_input,
    annotate_norm,
    annotate_output,
    annotate_weight,
)
from graphopt.ir.editor import Editor
from graphopt.ir.records import ActivationRecord
from graphopt.passes.fold_batchnorm import is_foldable
from graphopt.passes.pass_base import Pass
from graphopt.schemes.quantize import plan_blocks
from graphopt.specs import (
    PerBlockGranularity,
    PerChannelGranularity,
    PerTensorGranularity,
    QuantizationSpec,
)

__all__ = ["AnnotateQuantization"]


@dataclass(frozen=True)
class AnnotateQuantization(Pass):
    """Attach annotations to weights, to values that are quantized, and to norms that are folded.

    The graph's nodes stay as they are; `gm.meta` gets the table of what stays in float and why.

    Attributes:
        config: What is asked for.
        on_unmatched: Whether a key that matches no module, op or state is an error or a warning.
        fused: Activation functions that the target computes together with the op before; None for
            all.
        integer_results: Whether the target needs rounded results to compute with integers.
        float_ops: Names of ops that the target computes in float, unless they read a stored weight.

    Examples:
        >>> from graphopt.quantization import QuantizerConfig
        >>> AnnotateQuantization(QuantizerConfig.presets.w8())(program.graph_module).modified
        True
    """

    name: ClassVar[str] = "annotate-quantization"
    config: QuantizerConfig
    on_unmatched: Literal["error", "warn"] = "error"
    fused: frozenset[str] | None = None
    integer_results: bool = False
    float_ops: frozenset[str] = frozenset()

    @override
    def run(self, edit: Editor) -> None:
        selector = Selector(self.config)
        weights = find_weights(edit.gm)
        touch_modules(edit.gm, selector, weights)
        rows = []
        for weight in weights:
            decision = decide(
                weight, selector, QuantizationSpec, partial(self._refusal, weight), "quantize"
            )
            if decision.spec is not None:
                spec = decision.spec
                if weight.sparse is not None:
                    # the values of a pruned weight know no channels
                    spec = spec.model_copy(update={"granularity": PerTensorGranularity()})
                elif spec.granularity == PerChannelGranularity():
                    channels = _channels(weight)
                    spec = spec.model_copy(update={"granularity": channels})
                annotation = WeightAnnotation(spec, weight.output_axis, decision.path)
                for node in weight.nodes:
                    annotate_weight(node, annotation)
                edit.changed = True
            elif weight.tensor.ndim >= 2 or weight.compressed or decision.chosen:
                rows.append(skipped_row(weight, decision))
        plan = plan_activations(
            edit.gm,
            selector,
            self.fused,
            integer_results=self.integer_results,
            float_ops=self.float_ops,
        )
        self._apply(edit, plan)
        uses = [match.use for match in plan.matches]
        remarks = report_unmatched(selector, edit.gm, weights, self.on_unmatched, uses)
        for remark in plan.remarks:
            warnings.warn(remark, ConfigWarning, stacklevel=2)
        floats = tuple(
            ActivationRecord(name=name, status="float", detail=f"{kind}: {why}")
            for name, kind, why in plan.floats
        )
        edit.record(rows, remarks=(*remarks, *plan.remarks), activations=floats)

    def _apply(self, edit: Editor, plan: ActivationPlan) -> None:
        for node, point in plan.outputs.items():
            annotate_output(node, point)
        for (node, position), point in plan.inputs.items():
            annotate_input(node, position, point)
        for match in plan.matches:
            if match.norm is not None and is_foldable(edit, match.norm, match.node):
                annotate_norm(match.norm)
        edit.changed |= bool(plan.outputs or plan.inputs)

    def _refusal(self, weight: WeightTensor, spec: QuantizationSpec) -> str:
        if weight.tensor.dtype not in FLOAT_DTYPES:
            return f"{weight.tensor.dtype} values are not quantized"
        if weight.tensor.numel() == 0:
            return "has no elements"
        if spec.calculator not in ("default", "static", "mse"):
            return f"qparam_calculator_cls={spec.qparam_calculator_cls!r} is for activations"
        if weight.tensor.ndim < 2 and all(use.role == "bias" for use in weight.uses):
            return "biases are kept in float, which costs next to nothing"
        if weight.sparse is not None:
            return ""
        try:
            _, note = plan_blocks(weight.tensor.shape, weight.output_axis, spec.granularity)
        except CompressionError as error:
            warnings.warn(f"{weight.name}: {error}; left as it is", ConfigWarning, stacklevel=2)
            return str(error)
        if note:
            warnings.warn(f"{weight.name}: {note}", ConfigWarning, stacklevel=2)
        return ""


def _channels(weight: WeightTensor) -> PerChannelGranularity | PerBlockGranularity:
    """Granularity of one scale per output channel.

    A transposed convolution in groups keeps output channels on two axes: that of its inputs, which
    the groups divide, and that of the outputs of each group.
    """
    groups = max(
        (_transposed_groups(user) for node in weight.nodes for user in node.users), default=1
    )
    if groups == 1:
        return PerChannelGranularity()
    inputs, outputs, *others = weight.tensor.shape
    if inputs == groups and outputs == 1:
        return PerChannelGranularity(axis=0)
    return PerBlockGranularity(block_size=(inputs // groups, 1, *others))


def _transposed_groups(node: fx.Node) -> int:
    info = op_info.info_of(node)
    if info is None or info.convolution is None or not info.convolution.transposed:
        return 1
    return int(op_info.argument(node, info.convolution.groups, 1))
