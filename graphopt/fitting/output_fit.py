"""Fit palettes layer by layer to the outputs of the uncompressed program.

Every layer is fitted with the inputs that it will get, those of the already compressed layers
before it, to what `graphopt.fitting.moments` says it should put out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, fx

from graphopt.analysis.matrix_form import MatrixForm, WeightUse, weight_uses
from graphopt.analysis.weights import WeightTensor, find_weights
from graphopt.fitting.evidence import Evidence
from graphopt.fitting.fitted_layers import FittedLayers
from graphopt.fitting.importance import element_importance
from graphopt.fitting.layer_data import LayerData, fitted_together
from graphopt.fitting.layer_tasks import Found, Layer, fit_tables_of, task_of
from graphopt.fitting.moments import bias_of, missing_beside
from graphopt.fitting.output_loss import OutputLoss
from graphopt.fitting.palettize_outputs import NO_ORDER, palettize_to_outputs
from graphopt.ir.annotations import palette_annotation
from graphopt.ir.correspondence import Correspondence
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.progress import track
from graphopt.run.layerwise import LayerwiseRun
from graphopt.run.workers import Task
from graphopt.schemes.palettize import PalettizedWeight, palettize

__all__ = ["OutputFit", "fit_to_outputs"]

_EMBEDDING_DAMPING = 0.3
_Missing = Sequence[tuple[Tensor, Tensor]] | None  # what `missing_beside` says


@dataclass(frozen=True)
class OutputFit:
    """What the fit found.

    Attributes:
        palettes: Name of the weight → its stored form.
        biases: Name of the bias → its corrected value.
        fallbacks: Name of the weight → why its errors could not be fed back.
    """

    palettes: dict[str, PalettizedWeight]
    biases: dict[str, Tensor]
    fallbacks: dict[str, str]


def fit_to_outputs(
    annotated: Program,
    names: Sequence[str],
    evidence: Evidence,
    known: Mapping[str, PalettizedWeight],
) -> OutputFit:
    """Palettize the weights `names` one after the other.

    Args:
        annotated: A program whose weights `AnnotatePalettization` has seen; it is not changed.
        names: Weights to fit.
        evidence: What a calibration has seen; ops whose saliency lacks batches weigh all positions
            alike.
        known: Palettes of other weights, which count as compressed before.
    """
    work = annotated.copy()
    edit = Editor(work.graph_module)
    weights = {weight.name: weight for weight in find_weights(work.graph_module)}
    for name, palettized in known.items():
        _set(edit, weights[name], palettized.dense())
    chosen = [weights[name] for name in names]
    uses = weight_uses(work.graph_module, chosen)
    ops = {readers[0].node: name for name, readers in uses.items() if len(readers) == 1}
    store = evidence.resources.store()
    run = LayerwiseRun(work.graph_module, evidence.batches, store)
    reference = LayerwiseRun(annotated.graph_module, evidence.batches, store)
    partners = Correspondence.by_name(work.graph_module, annotated.graph_module)
    done = FittedLayers(evidence, "tables", annotated.graph_module, names)
    layers = _Layers(edit, run, reference, partners, evidence, done)
    for weight in chosen:
        if weight.name not in ops.values():
            reason = "several ops read it" if weight.name in uses else "its op has no matrix form"
            layers.result.fallbacks[weight.name] = reason
            layers.keep(weight, _plain(weight, None, evidence.seed))
    steps = [node for node in partners if node.op != "output"]
    left = {node: (weights[name], uses[name][0]) for node, name in ops.items()}
    for node in track(steps, "fitting layers", len(steps), enabled=evidence.progress):
        if node in left:
            layers.fit(node, left)
        run.step(node)
        reference.step(partners[node])
    return layers.result


@dataclass(frozen=True)
class _Layers:
    """The program on its way from layer to layer, beside the exact one, and what was found so far."""

    edit: Editor
    run: LayerwiseRun
    reference: LayerwiseRun
    partners: Correspondence
    evidence: Evidence
    done: FittedLayers
    result: OutputFit = field(default_factory=lambda: OutputFit({}, {}, {}))

    def fit(self, node: fx.Node, left: dict[fx.Node, tuple[WeightTensor, WeightUse]]) -> None:
        """Palettize the weight of the op that runs next, and those that see now what they will see.

        Args:
            node: The op.
            left: Ops whose weights are not fitted yet; those that are leave it.
        """
        weight, use = left[node]
        if use.form.kind == "embedding":
            found = self.done.get(weight.name)
            if found is None:
                found = self._fit_embedding(weight, use)
                self.done.add(weight.name, found)
            self._take(weight, use, found)
            del left[node]
            return
        others = [use for _, use in left.values() if use.form.kind != "embedding"]
        others.remove(use)
        together = fitted_together(use, others, self.run, self.partners)
        layers = [left.pop(each.node) for each in together]
        tasks = {weight.name: partial(self._task, weight, use) for weight, use in layers}
        fits = self.done.fitted(fit_tables_of, tasks, self.evidence.resources.executor)
        for (weight, use), found in zip(layers, fits, strict=True):
            self._take(weight, use, found)

    def _take(self, weight: WeightTensor, use: WeightUse, found: Found[PalettizedWeight]) -> None:
        if found.fallback:
            self.result.fallbacks[weight.name] = found.fallback
        self.keep(weight, found.stored)
        bias = bias_of(use)
        if found.bias is not None and bias is not None:
            self.edit.set_value(bias, found.bias)
            self.result.biases[str(bias.target)] = found.bias

    def _task(self, weight: WeightTensor, use: WeightUse) -> Task:
        annotation = palette_annotation(weight.nodes[0])
        assert annotation is not None
        seed, device = self.evidence.seed, self.evidence.resources.device
        layer = Layer(use.loose(), annotation.spec, annotation.output_axis, seed, device)
        bias = bias_of(use) if self.evidence.correct_bias else None
        data = LayerData.of(use, self.run, self.reference, self.partners, self._saliency(use))
        own = None if bias is None else self.edit.value(bias).detach()
        return task_of(layer, weight.tensor.detach(), own, data)

    def _fit_embedding(self, weight: WeightTensor, use: WeightUse) -> Found[PalettizedWeight]:
        """Errors go on along each vector, weighed by the gradients there.

        A vector counts by the saliency of the positions that took it, plus as much as the mean one:
        what calibration did not see will come.
        """
        annotation = palette_annotation(weight.nodes[0])
        assert annotation is not None
        original, seed = weight.tensor.detach(), self.evidence.seed
        indices = self.run.values(use.data)
        missing = missing_beside(use, self.run, self.reference, self.partners)
        taken, gap = _embedding_evidence(use, original, indices, missing, self._saliency(use))
        importance = 1 + taken / taken.mean().clamp_min(1e-30)
        target = original
        if gap is not None:
            moved = use.matrix(original, casts=False) + gap[None, :, None]
            target = use.pull_back(moved, original.shape).to(original.dtype).contiguous()
        along = replace(use, form=MatrixForm("linear"))
        spread = self.evidence.spread.get(use.node.name)
        palettized, reason = None, "no gradient reached it"
        if spread is not None and bool(spread.any()):
            loss = OutputLoss(along, spread[None], importance[None], _EMBEDDING_DAMPING)
            palettized = palettize_to_outputs(
                target, annotation.spec, loss, output_axis=annotation.output_axis, seed=seed
            )
            reason = NO_ORDER
        if palettized is not None:
            return Found(palettized)
        weighed = element_importance(along, original, rows=importance[None])
        return Found(_plain(replace(weight, tensor=target), weighed, seed), None, reason)

    def _saliency(self, use: WeightUse) -> Sequence[Tensor] | None:
        rows = self.evidence.saliency.get(use.node.name)
        return rows if rows is not None and len(rows) == len(self.evidence.batches) else None

    def keep(self, weight: WeightTensor, palettized: PalettizedWeight) -> None:
        """Let a stored form take the weight's place for the layers behind."""
        dense = palettized.dense()
        error = (weight.tensor.detach().double() - dense.double()).square().sum()
        self.result.palettes[weight.name] = replace(palettized, sse=float(error))
        _set(self.edit, weight, dense)


def _embedding_evidence(
    use: WeightUse,
    original: Tensor,
    indices: Sequence[Tensor],
    missing: _Missing,
    saliency: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """How much each vector was taken, and what the vectors lack on the mean, if it is known."""
    taken = torch.zeros(use.matrix(original, casts=False).shape[2])
    gap, total = torch.zeros(()), 0.0
    for number, ids in enumerate(indices):
        counted = torch.ones(ids.numel())
        if saliency is not None and saliency[number].numel() == ids.numel():
            counted = saliency[number].reshape(-1).float().sqrt()
        taken.index_add_(0, ids.reshape(-1), counted)
        if missing is None:
            continue
        exact, actual = missing[number]
        lacks = exact.float() - actual.float()
        if lacks.numel() // lacks.shape[-1] != ids.numel():
            counted = torch.ones(lacks.numel() // lacks.shape[-1])
        gap = gap + counted @ lacks.reshape(-1, lacks.shape[-1])
        total += float(counted.sum())
    return taken, gap / total if total > 0 else None


def _set(edit: Editor, weight: WeightTensor, dense: Tensor) -> None:
    edit.set_value(weight.nodes[0], dense, tied=weight.nodes[1:])


def _plain(weight: WeightTensor, importance: Tensor | None, seed: int) -> PalettizedWeight:
    annotation = palette_annotation(weight.nodes[0])
    assert annotation is not None
    return palettize(
        weight.tensor,
        annotation.spec,
        output_axis=annotation.output_axis,
        importance=importance,
        seed=seed,
    )
