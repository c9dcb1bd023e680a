"""Fit palettes layer by layer to the outputs of the uncompressed program.

Every layer is fitted with the inputs that it will get, those of the already compressed layers
before it, to what `graphopt.fitting.moments` says it should put out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from graphopt.analysis.matrix_form import MatrixForm, WeightUse, weight_uses
from graphopt.analysis.weights import WeightTensor, find_weights
from graphopt.fitting.importance import element_importance
from graphopt.fitting.layer_target import LayerTarget
from graphopt.fitting.moments import bias_of, collect_moments, missing_beside
from graphopt.fitting.palettize_outputs import (
    NO_ORDER,
    palettize_by_columns,
    palettize_to_outputs,
)
from graphopt.ir.annotations import palette_annotation
from graphopt.ir.correspondence import Correspondence
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.progress import track
from graphopt.run.batches import Batch
from graphopt.run.layerwise import LayerwiseRun
from graphopt.schemes.palettize import PalettizedWeight, palettize

__all__ = ["OutputFit", "fit_to_outputs"]

_LOOKUP_DAMPING = 0.3


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
    batches: Sequence[Batch],
    known: Mapping[str, PalettizedWeight],
    saliency: Mapping[str, Sequence[Tensor]],
    spread: Mapping[str, Tensor],
    *,
    names: Sequence[str],
    correct_bias: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> OutputFit:
    """Palettize the weights `names` one after the other.

    Args:
        annotated: A program whose weights `AnnotatePalettization` has seen; it is not changed.
        batches: Calibration inputs.
        known: Palettes of other weights, which count as compressed before.
        saliency: Node → [batch, positions] per batch; nodes without one weigh all positions alike.
        spread: Node of a lookup → second moment of the gradient of its output, [rows, rows].
        names: Weights to fit.
        correct_bias: Let the op's own bias take up the mean of the error.
        seed: Seed of vector tables.
        progress: Show a bar; None shows it on a terminal.
    """
    work = annotated.copy()
    edit = Editor(work.graph_module)
    weights = {weight.name: weight for weight in find_weights(work.graph_module)}
    for name, palettized in known.items():
        _set(edit, weights[name], palettized.dense())
    chosen = [weights[name] for name in names]
    uses = weight_uses(work.graph_module, chosen)
    ops = {found[0].node: name for name, found in uses.items() if len(found) == 1}
    run = LayerwiseRun(work.graph_module, batches)
    reference = LayerwiseRun(annotated.graph_module, batches)
    partners = Correspondence.by_name(work.graph_module, annotated.graph_module)
    result = OutputFit({}, {}, {})
    for weight in chosen:
        if weight.name not in ops.values():
            reason = "several ops read it" if weight.name in uses else "its op has no matrix form"
            result.fallbacks[weight.name] = reason
            _keep(edit, weight, _plain(weight, None, seed), result)
    steps = [node for node in partners if node.op != "output"]
    for node in track(steps, "fitting layers", len(steps), enabled=progress):
        if node in ops:
            weight, use = weights[ops[node]], uses[ops[node]][0]
            _fit(
                edit,
                weight,
                use,
                run,
                reference,
                partners,
                saliency,
                spread,
                result,
                correct_bias,
                seed,
            )
        run.step(node)
        reference.step(partners[node])
    return result


def _fit(
    edit: Editor,
    weight: WeightTensor,
    use: WeightUse,
    run: LayerwiseRun,
    reference: LayerwiseRun,
    partners: Correspondence,
    saliency: Mapping[str, Sequence[Tensor]],
    spread: Mapping[str, Tensor],
    result: OutputFit,
    correct_bias: bool,
    seed: int,
) -> None:
    annotation = palette_annotation(weight.nodes[0])
    assert annotation is not None
    inputs = use.node.args[use.form.data]
    assert isinstance(inputs, fx.Node)
    wanted = partners[inputs]
    missing = missing_beside(use, run, reference, partners)
    if use.form.kind == "lookup":
        table, reason = _fit_lookup(
            weight,
            use,
            run.values(inputs),
            missing,
            saliency.get(use.node.name),
            spread.get(use.node.name),
            seed,
        )
        if reason:
            result.fallbacks[weight.name] = reason
        _keep(edit, weight, table, result)
        return
    original = weight.tensor.detach()
    bias = bias_of(use) if correct_bias else None
    moments = collect_moments(
        use,
        run.values(inputs),
        reference.values(wanted),
        saliency.get(use.node.name),
        missing,
        centred=bias is not None,
        seed=seed,
    )
    target = LayerTarget.of(use, original, moments)
    axis, spec = annotation.output_axis, annotation.spec
    found = palettize_to_outputs(
        target.weight, spec, use, target.hessian, output_axis=axis, seed=seed
    )
    if found is None:
        result.fallbacks[weight.name] = NO_ORDER
        found = palettize_by_columns(
            original, spec, use, target.hessian, output_axis=axis, seed=seed
        )
    _keep(edit, weight, found, result)
    if bias is not None:
        corrected = target.bias(edit.value(bias).detach(), found.dense())
        edit.set_value(bias, corrected)
        result.biases[str(bias.target)] = corrected


def _fit_lookup(
    weight: WeightTensor,
    use: WeightUse,
    indices: Sequence[Tensor],
    missing: Sequence[tuple[Tensor, Tensor]] | None,
    saliency: Sequence[Tensor] | None,
    spread: Tensor | None,
    seed: int,
) -> tuple[PalettizedWeight, str]:
    """Palettize a table of vectors: errors go on along each vector, weighed by the gradients there.

    A vector counts by the saliency of the positions that took it, plus as much as the mean one: what
    calibration did not see will come.

    Returns:
        The stored form, and why errors could not go on, or "".
    """
    annotation = palette_annotation(weight.nodes[0])
    assert annotation is not None
    original = weight.tensor.detach()
    taken = torch.zeros(use.matrix(original, casts=False).shape[2])
    gap, total = torch.zeros(()), 0.0
    for number, ids in enumerate(indices):
        counted = torch.ones(ids.numel())
        if saliency is not None and saliency[number].numel() == ids.numel():
            counted = saliency[number].reshape(-1).float().sqrt()
        taken.index_add_(0, ids.reshape(-1), counted)
        if missing is None:
            continue
        exact, found = missing[number]
        lacks = exact.float() - found.float()
        if lacks.numel() // lacks.shape[-1] != ids.numel():
            counted = torch.ones(lacks.numel() // lacks.shape[-1])
        gap = gap + counted @ lacks.reshape(-1, lacks.shape[-1])
        total += float(counted.sum())
    importance = 1 + taken / taken.mean().clamp_min(1e-30)
    target = original
    if total > 0:
        moved = use.matrix(original, casts=False) + (gap / total)[None, :, None]
        target = use.pull_back(moved, original.shape).to(original.dtype).contiguous()
    along = replace(use, form=MatrixForm("linear"))
    if spread is not None and bool(spread.any()):
        fitted = palettize_to_outputs(
            target,
            annotation.spec,
            along,
            spread[None],
            output_axis=annotation.output_axis,
            row_importance=importance[None],
            damping=_LOOKUP_DAMPING,
            seed=seed,
        )
        if fitted is not None:
            return fitted, ""
        reason = NO_ORDER
    else:
        reason = "no gradient reached it"
    weighed = element_importance(along, original, rows=importance[None])
    return _plain(replace(weight, tensor=target), weighed, seed), reason


def _keep(
    edit: Editor, weight: WeightTensor, palettized: PalettizedWeight, result: OutputFit
) -> None:
    dense = palettized.dense()
    error = (weight.tensor.detach().double() - dense.double()).square().sum()
    result.palettes[weight.name] = replace(palettized, sse=float(error))
    _set(edit, weight, dense)


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
