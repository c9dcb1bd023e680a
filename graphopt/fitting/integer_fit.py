"""Fit quantized weights layer by layer to the outputs of the exact program, activations rounded.

Every layer is fitted with the inputs that it will get, rounded and from compressed layers, to what the
exact layer puts out on exact inputs: error feedback (GPTQ, arXiv 2210.17323) with the asymmetric
target of GPTAQ (arXiv 2504.02692) and a bias for the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx

from graphopt.analysis.activation_places import places_of
from graphopt.analysis.matrix_form import WeightUse, weight_uses
from graphopt.analysis.weights import WeightTensor, find_weights
from graphopt.fitting.evidence import Evidence
from graphopt.fitting.fitted_layers import FittedLayers
from graphopt.fitting.layer_data import LayerData, fitted_together
from graphopt.fitting.layer_tasks import Layer, fit_integers_of, task_of
from graphopt.fitting.moments import bias_of
from graphopt.ir.annotations import quantization_annotation
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.correspondence import Correspondence
from graphopt.ir.editor import Editor
from graphopt.ir.program import share_graph
from graphopt.numerics.affine import QParams
from graphopt.prepared import ActivationQuantizer
from graphopt.progress import track
from graphopt.run.layerwise import LayerwiseRun
from graphopt.run.workers import Task
from graphopt.schemes.quantize import QuantizedWeight, plan_blocks, quantize_weight
from graphopt.specs import QuantizationSpec

__all__ = ["EMBEDDING", "IntegerFit", "fit_integers"]

EMBEDDING = "it is an embedding"  # no input is multiplied with it


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
    batches, store = evidence.batches, evidence.resources.store()
    run, reference = (LayerwiseRun(graph, batches, store) for graph in (work, annotated))
    done = FittedLayers(evidence, "integers", annotated, names)
    fit = _Fit(edit, run, reference, evidence, done)
    fitted = {weight.name for weight, _ in ops.values()}
    for weight in weights.values():
        annotation = quantization_annotation(weight.nodes[0])
        if annotation is not None and weight.name not in fitted and weight.sparse is None:
            spec, axis = annotation.spec, annotation.output_axis
            fit.set(weight, _nearest(weight.tensor, spec, axis))
    for weight in chosen:
        if weight.name not in fitted:
            fit.result.fallbacks[weight.name] = _why_not(weight, uses)
    left = dict(ops)
    rounded = _RoundedActivations(fit.run, evidence.scales)
    exact = Correspondence.of_copy(work, annotated)
    steps = [node for node in work.graph.nodes if node.op != "output"]
    for node in track(steps, "fitting layers", len(steps), enabled=evidence.progress):
        if node in left:
            fit.layers(rounded, node, left)
        with rounded.operands_of(node):
            fit.run.step(node)
        rounded.result_of(node)
        fit.reference.step(exact[node])
    return fit.result


def _why_not(weight: WeightTensor, uses: Mapping[str, Sequence[WeightUse]]) -> str:
    readers = uses.get(weight.name)
    if readers is None:
        return "its op has no matrix form"
    return EMBEDDING if len(readers) == 1 else "several ops read it"


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

    def __init__(
        self,
        edit: Editor,
        run: LayerwiseRun,
        reference: LayerwiseRun,
        evidence: Evidence,
        done: FittedLayers,
    ) -> None:
        self.edit, self.run, self.reference, self.evidence = edit, run, reference, evidence
        self.done = done
        self.partners = Correspondence.by_name(run.gm, reference.gm)
        self.result = IntegerFit()

    def layers(
        self,
        rounded: _RoundedActivations,
        node: fx.Node,
        left: dict[fx.Node, tuple[WeightTensor, WeightUse]],
    ) -> None:
        """Quantize the weight of the op that runs next, and those that see now what they will see.

        Args:
            rounded: What rounds the ops' inputs.
            node: The op.
            left: Ops whose weights are not fitted yet; those that are leave it.
        """
        others = [use for _, use in left.values() if use.node is not node]
        together = fitted_together(left[node][1], others, self.run, self.partners)
        layers = [left.pop(use.node) for use in together]
        tasks = {weight.name: partial(self._task, rounded, weight, use) for weight, use in layers}
        fits = self.done.fitted(fit_integers_of, tasks, self.evidence.resources.executor)
        for (weight, use), found in zip(layers, fits, strict=True):
            if found.fallback:
                self.result.fallbacks[weight.name] = found.fallback
            else:
                self.result.weights[weight.name] = found.stored
            bias = bias_of(use)
            if found.bias is not None and bias is not None:
                self.edit.set_value(bias, found.bias)
                self.result.biases[str(bias.target)] = found.bias
            self.set(weight, found.stored.dense())

    def _task(self, rounded: _RoundedActivations, weight: WeightTensor, use: WeightUse) -> Task:
        annotation = quantization_annotation(weight.nodes[0])
        assert annotation is not None
        bias, seed, device = bias_of(use), self.evidence.seed, self.evidence.resources.device
        layer = Layer(use.loose(), annotation.spec, annotation.output_axis, seed, device)
        with rounded.operands_of(use.node):
            data = LayerData.of(use, self.run, self.reference, self.partners)
        own = None if bias is None else self.edit.value(bias).detach()
        return task_of(layer, weight.tensor.detach(), own, data)

    def set(self, weight: WeightTensor, dense: Tensor) -> None:
        """Let a stored form take the weight's place for the layers behind."""
        value = dense.to(weight.tensor.dtype)
        self.edit.set_value(weight.nodes[0], value, tied=weight.nodes[1:])
