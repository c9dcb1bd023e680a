"""Fit quantized weights layer by layer to the outputs of the exact program, activations rounded.

Every layer is fitted with the inputs that it will get, rounded and from compressed layers, to what the
exact layer puts out on exact inputs: error feedback (GPTQ, arXiv 2210.17323) with the asymmetric
target of GPTAQ (arXiv 2504.02692) and a bias for the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from graphopt.analysis.activation_places import places_of
from graphopt.analysis.matrix_form import WeightUse, weight_uses
from graphopt.analysis.weights import WeightTensor, find_weights
from graphopt.fitting.evidence import Evidence
from graphopt.fitting.layer_target import LayerTarget
from graphopt.fitting.moments import LayerMoments, bias_of, collect_moments, missing_beside
from graphopt.fitting.quantize_outputs import quantize_to_outputs
from graphopt.ir.annotations import quantization_annotation
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.correspondence import Correspondence
from graphopt.ir.editor import Editor
from graphopt.ir.program import share_graph
from graphopt.numerics.affine import QParams
from graphopt.prepared import ActivationQuantizer
from graphopt.progress import track
from graphopt.run.layerwise import LayerwiseRun
from graphopt.schemes.quantize import QuantizedWeight, plan_blocks, quantize_weight
from graphopt.specs import QuantizationSpec

__all__ = ["LOOKED_UP", "IntegerFit", "fit_integers"]

LOOKED_UP = "it is looked up"  # an embedding, which no input is multiplied with


@dataclass(frozen=True)
class IntegerFit:
    """What the fit found.

    Attributes:
        weights: Name of the weight → its stored form.
        biases: Name of the bias → its corrected value.
        fallbacks: Name of the weight → why its errors could not be fed back.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)


def fit_integers(
    annotated: CapturedModule,
    names: Sequence[str],
    evidence: Evidence,
) -> IntegerFit:
    """Quantize the weights `names` one after the other; what else is annotated counts as well.

    Args:
        annotated: A graph that `AnnotateQuantization` has seen, norms folded; it is not changed.
        names: Weights to fit.
        evidence: Inputs, and the scales by which activations are rounded.
    """
    work = share_graph(annotated)
    edit = Editor(work)
    weights = {weight.name: weight for weight in find_weights(work)}
    chosen = [weights[name] for name in names]
    uses = weight_uses(work, chosen)
    ops = {
        readers[0].node: (weights[name], readers[0])
        for name, readers in uses.items()
        if len(readers) == 1 and readers[0].form.kind != "embedding"
    }
    batches = evidence.batches
    fit = _Fit(edit, LayerwiseRun(work, batches), LayerwiseRun(annotated, batches), evidence.seed)
    fitted = {weight.name for weight, _ in ops.values()}
    for weight in weights.values():
        annotation = quantization_annotation(weight.nodes[0])
        if annotation is not None and weight.name not in fitted and weight.sparse is None:
            spec, axis = annotation.spec, annotation.output_axis
            fit.set(weight, _nearest(weight.tensor, spec, axis))
    for weight in chosen:
        if weight.name not in fitted:
            fit.result.fallbacks[weight.name] = _why_not(weight, uses)
    rounded = _RoundedActivations(fit.run, evidence.scales)
    # one is a copy of the other; nodes that call modules (guards of `ep.module()`) have no partners
    twins = dict(zip(work.graph.nodes, annotated.graph.nodes, strict=True))
    steps = [node for node in work.graph.nodes if node.op != "output"]
    for node in track(steps, "fitting layers", len(steps), enabled=evidence.progress):
        with rounded.operands_of(node):
            if node in ops:
                fit.layer(*ops[node])
            fit.run.step(node)
        rounded.result_of(node)
        fit.reference.step(twins[node])
    return fit.result


def _why_not(weight: WeightTensor, uses: Mapping[str, Sequence[WeightUse]]) -> str:
    readers = uses.get(weight.name)
    if readers is None:
        return "its op has no matrix form"
    return LOOKED_UP if len(readers) == 1 else "several ops read it"


def _nearest(tensor: Tensor, spec: QuantizationSpec, axis: int) -> Tensor:
    blocks, _ = plan_blocks(tensor.shape, axis, spec.granularity)
    return quantize_weight(tensor.detach(), spec, blocks).dense()


class _RoundedActivations:
    """Rounds values of a run as the target will: for all readers, or for one."""

    def __init__(self, run: LayerwiseRun, scales: Mapping[str, QParams]) -> None:
        self.run = run
        self.whole: dict[fx.Node, ActivationQuantizer] = {}
        self.local: dict[fx.Node, dict[fx.Node, ActivationQuantizer]] = {}
        for point, operand, users in places_of(run.gm):
            known = scales.get(point.group)
            if point.derived or (known is None and not point.spec.dynamic):
                continue
            quantizer = ActivationQuantizer(point.spec, 1 if known is None else known[0].numel())
            quantizer.eval().rounding = True
            if known is not None:
                quantizer.hold(*known)
            if users is None:
                self.whole[operand] = quantizer
                if operand.op == "placeholder":
                    self.result_of(operand)
            else:
                for node, _ in users:
                    self.local.setdefault(node, {})[operand] = quantizer

    @torch.no_grad()
    def result_of(self, node: fx.Node) -> None:
        """Round what a node has given, where all readers get it rounded."""
        if node in self.whole and node.users and self.run.has_values(node):
            values = self.run.values(node)
            self.run.set_values(node, [self.whole[node](value) for value in values])

    def operands_of(self, node: fx.Node) -> _Swapped:
        """A context in which a node reads its operands rounded."""
        return _Swapped(self.run, self.local.get(node, {}))


class _Swapped:
    def __init__(self, run: LayerwiseRun, local: Mapping[fx.Node, ActivationQuantizer]) -> None:
        self.run, self.local = run, local
        self.kept: dict[fx.Node, list[Tensor]] = {}

    @torch.no_grad()
    def __enter__(self) -> None:
        for operand, quantizer in self.local.items():
            if self.run.has_values(operand):
                self.kept[operand] = self.run.values(operand)
                rounded = [quantizer(value) for value in self.kept[operand]]
                self.run.set_values(operand, rounded)

    def __exit__(self, *error: object) -> None:
        for operand, values in self.kept.items():
            if self.run.has_values(operand):
                self.run.set_values(operand, values)


class _Fit:
    """The program on its way from layer to layer, beside the exact one, and what was found so far."""

    def __init__(self, edit: Editor, run: LayerwiseRun, reference: LayerwiseRun, seed: int) -> None:
        self.edit, self.run, self.reference, self.seed = edit, run, reference, seed
        self.partners = Correspondence.by_name(run.gm, reference.gm)
        self.result = IntegerFit()

    def layer(self, weight: WeightTensor, use: WeightUse) -> None:
        """Quantize the weight of the op that runs next."""
        annotation = quantization_annotation(weight.nodes[0])
        assert annotation is not None
        original, bias = weight.tensor.detach(), bias_of(use)
        spec = annotation.spec
        blocks, _ = plan_blocks(original.shape, annotation.output_axis, spec.granularity)
        moments = self._moments(use, centred=bias is not None)
        quantized = None
        if moments is not None:
            target = LayerTarget.of(use, original, moments)
            quantized = quantize_to_outputs(target.weight, spec, blocks, target.loss())
        if quantized is None or moments is None:
            reason = "calibration never reached it" if moments is None else "its blocks cross rows"
            self.result.fallbacks[weight.name] = reason
            self.set(weight, quantize_weight(original, spec, blocks).dense())
            return
        dense = quantized.dense()
        self.result.weights[weight.name] = quantized.measured(original)
        if bias is not None:
            corrected = target.bias(self.edit.value(bias).detach(), dense)
            self.edit.set_value(bias, corrected)
            self.result.biases[str(bias.target)] = corrected
        self.set(weight, dense)

    def _moments(self, use: WeightUse, *, centred: bool) -> LayerMoments | None:
        inputs = use.node.args[use.form.data]
        assert isinstance(inputs, fx.Node)
        return collect_moments(
            use,
            self.run.values(inputs),
            self.reference.values(self.partners[inputs]),
            None,
            missing_beside(use, self.run, self.reference, self.partners),
            centred=centred,
            seed=self.seed,
        )

    def set(self, weight: WeightTensor, dense: Tensor) -> None:
        """Let a stored form take the weight's place for the layers behind."""
        value = dense.to(weight.tensor.dtype)
        self.edit.set_value(weight.nodes[0], value, tied=weight.nodes[1:])
