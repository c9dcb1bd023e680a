"""Fit palettes layer by layer to the outputs of the uncompressed program.

Every layer is fitted with the inputs that it will get, those of the already compressed layers
before it. Its target is the output of the uncompressed layer on the uncompressed inputs: the
regression `W* = W + α·W·E[(x − x̂)x̂ᵀ]·(E[x̂x̂ᵀ] + λI)⁻¹` (the asymmetric calibration of GPTAQ, Li et al.,
arXiv 2504.02692, equation 6, with a ridge) makes up for what the inputs have lost, and a bias for
the mean. What the other operand of the sum behind a layer has lost (a residual stream, another
embedding) is added to the target, as far as the layer's inputs can tell it. Positions count by the
square root of their saliency, so that padding does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from graphopt.annotations import palette_annotation
from graphopt.editor import Editor
from graphopt.layerwise import Batch, LayerwiseRun
from graphopt.matrix_form import MatrixForm, WeightUse, weight_uses
from graphopt.program import Program
from graphopt.progress import track
from graphopt.schemes.palettize import PalettizedWeight, palettize
from graphopt.schemes.palettize_outputs import palettize_to_outputs
from graphopt.weights import WeightTensor, find_weights

__all__ = ["OutputFit", "fit_to_outputs"]

_RIDGE = 0.3  # λ relative to the mean diagonal
_LOOKUP_DAMPING = 0.3
_POSITIONS = 16_384  # sampled for a layer's moments, or more for long columns
_POSITIONS_PER_COLUMN = 8
_NO_ORDER = "its tables do not follow the rows and columns of its matrix"
_aten = torch.ops.aten
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor)
_COPIES = (_aten.clone.default, _aten.alias.default, torch.ops.graphopt.dropout.default)


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


@dataclass(frozen=True)
class _Moments:
    hessian: Tensor  # E[x̂x̂ᵀ], of centred columns where a bias takes the mean
    shift: Tensor  # E[(x − x̂)x̂ᵀ]
    mean: Tensor  # E[x̂]
    wanted: Tensor  # E[x]
    beside: Tensor  # E[(r − r̂)x̂ᵀ] of what is added to the outputs
    beside_mean: Tensor  # E[r − r̂]


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
    twins = dict(
        zip(work.graph_module.graph.nodes, annotated.graph_module.graph.nodes, strict=True)
    )
    result = OutputFit({}, {}, {})
    for weight in chosen:
        if weight.name not in ops.values():
            reason = "several ops read it" if weight.name in uses else "its op has no matrix form"
            result.fallbacks[weight.name] = reason
            _keep(edit, weight, _plain(weight, None, seed), result)
    steps = [node for node in twins if node.op != "output"]
    for node in track(steps, "fitting layers", len(steps), enabled=progress):
        if node in ops:
            weight, use = weights[ops[node]], uses[ops[node]][0]
            _fit(edit, weight, use, run, reference, twins, saliency, spread,
                 result, correct_bias, seed)  # fmt: skip
        run.step(node)
        reference.step(twins[node])
    return result


def _fit(
    edit: Editor, weight: WeightTensor, use: WeightUse, run: LayerwiseRun, reference: LayerwiseRun,
    twins: dict[fx.Node, fx.Node], saliency: Mapping[str, Sequence[Tensor]],
    spread: Mapping[str, Tensor], result: OutputFit, correct_bias: bool, seed: int,
) -> None:  # fmt: skip
    annotation = palette_annotation(weight.nodes[0])
    assert annotation is not None
    inputs = use.node.args[use.form.data]
    assert isinstance(inputs, fx.Node)
    wanted = twins[inputs]
    missing = _missing_beside(use, run, reference, twins)
    if use.form.kind == "lookup":
        table, reason = _fit_lookup(
            weight, use, run.values(inputs), missing, saliency.get(use.node.name),
            spread.get(use.node.name), seed,
        )  # fmt: skip
        if reason:
            result.fallbacks[weight.name] = reason
        _keep(edit, weight, table, result)
        return
    original = weight.tensor.detach()
    bias = _own_bias(use.node) if correct_bias else None
    moments = _moments(
        use, run.values(inputs), reference.values(wanted), saliency.get(use.node.name),
        missing, centred=bias is not None, seed=seed,
    )  # fmt: skip
    target = _compensated(use, original, moments)
    found = palettize_to_outputs(
        target, annotation.spec, use, moments.hessian, output_axis=annotation.output_axis,
        seed=seed,
    )  # fmt: skip
    if found is None:
        result.fallbacks[weight.name] = _NO_ORDER
        level = moments.hessian.diagonal(dim1=1, dim2=2)[:, None, :].expand_as(use.matrix(original))
        importance = use.pull_back(level.contiguous(), original.shape).contiguous()
        found = _plain(weight, importance, seed)
    _keep(edit, weight, found, result)
    if bias is not None:
        dense = use.matrix(found.dense(), casts=False).double()
        exact = use.matrix(original, casts=False).double()
        change = (
            exact @ moments.wanted.double()[..., None] - dense @ moments.mean.double()[..., None]
        )
        change = change.reshape(-1) + moments.beside_mean.double().reshape(-1)
        old = edit.value(bias).detach()
        corrected = (old.double() + change.reshape(-1)).to(old.dtype)
        edit.set_value(bias, corrected)
        result.biases[str(bias.target)] = corrected


def _fit_lookup(
    weight: WeightTensor, use: WeightUse, indices: Sequence[Tensor],
    missing: Sequence[tuple[Tensor, Tensor]] | None, saliency: Sequence[Tensor] | None,
    spread: Tensor | None, seed: int,
) -> tuple[PalettizedWeight, str]:  # fmt: skip
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
            target, annotation.spec, along, spread[None], output_axis=annotation.output_axis,
            row_importance=importance[None], damping=_LOOKUP_DAMPING, seed=seed,
        )  # fmt: skip
        if fitted is not None:
            return fitted, ""
        reason = _NO_ORDER
    else:
        reason = "no gradient reached it"
    by_row = importance[None, :, None].expand_as(along.matrix(original, casts=False))
    weighed = along.pull_back(by_row.contiguous(), original.shape).contiguous()
    return _plain(replace(weight, tensor=target), weighed, seed), reason


def _missing_beside(
    use: WeightUse, run: LayerwiseRun, reference: LayerwiseRun, twins: Mapping[fx.Node, fx.Node]
) -> list[tuple[Tensor, Tensor]] | None:
    """The other operand of the sum behind the op, as it should be and as it is, where known already."""
    node, shape = use.node, _shape(use.node)
    if use.form.kind == "transposed":
        return None
    while len(node.users) == 1:
        reader = next(iter(node.users))
        if reader.target in _SUMS:
            left, right = reader.args[:2]
            other = right if left is node else left
            if not isinstance(other, fx.Node) or reader.kwargs:
                return None
            if not run.has_run(other) or node is other or not _fits(_shape(other), shape, use):
                return None
            return list(zip(reference.values(twins[other]), run.values(other), strict=True))
        if reader.target not in _COPIES:
            return None
        node = reader
    return None


def _fits(other: tuple[object, ...] | None, own: tuple[object, ...] | None, use: WeightUse) -> bool:
    """Whether an operand's error can be told for each row of the op's matrix."""
    if use.form.kind == "lookup":
        return bool(other and own and other[-1] == own[-1])
    return other == own


def _shape(node: fx.Node) -> tuple[object, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


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
        weight.tensor, annotation.spec, output_axis=annotation.output_axis, importance=importance,
        seed=seed,
    )  # fmt: skip


def _own_bias(node: fx.Node) -> fx.Node | None:
    """The constant that an op alone adds to its output."""
    place = 0 if node.target is _aten.addmm.default else 2
    forms = ("linear", "conv", "addmm")
    if not any(name in str(node.target) for name in forms) or "transpose" in str(node.target):
        return None
    if node.target is _aten.convolution.default and node.args[6]:
        return None
    bias = node.args[place] if len(node.args) > place else None
    alone = isinstance(bias, fx.Node) and bias.op == "get_attr" and set(bias.users) == {node}
    return bias if alone and isinstance(bias, fx.Node) else None


def _moments(
    use: WeightUse, inputs: Sequence[Tensor], wanted: Sequence[Tensor],
    saliency: Sequence[Tensor] | None, missing: Sequence[tuple[Tensor, Tensor]] | None, *,
    centred: bool, seed: int,
) -> _Moments:  # fmt: skip
    hessian = shift = mean = aim = beside = beside_mean = torch.zeros(())
    total = 0.0
    generator = torch.Generator().manual_seed(seed)
    for number, (x, y) in enumerate(zip(inputs, wanted, strict=True)):
        columns, exact = use.form.columns(x.float()), use.form.columns(y.float())
        weight = torch.ones(columns.shape[0], columns.shape[2])
        if saliency is not None and saliency[number].shape == weight.shape:
            weight = saliency[number].float().sqrt()
        columns, exact = columns.transpose(0, 1).flatten(1, 2), exact.transpose(0, 1).flatten(1, 2)
        used = weight.reshape(-1).nonzero()[:, 0]
        share = max(_POSITIONS, _POSITIONS_PER_COLUMN * columns.shape[2]) / len(inputs)
        if len(used) > share:
            # neighbouring positions say the same: a sample of them suffices
            used = used[torch.randperm(len(used), generator=generator)[: math.ceil(share)]]
        columns, exact = columns[:, used], exact[:, used]
        flat = weight.reshape(-1)[used].reshape(1, -1, 1)
        total += float(flat.double().sum())
        weighted = columns * flat
        hessian = hessian + weighted.mT @ columns
        shift = shift + (exact - columns).mT @ weighted
        mean = mean + weighted.sum(1)
        aim = aim + (exact * flat).sum(1)
        if missing is not None:
            lacks = missing[number][0].float() - missing[number][1].float()
            rest = use.form.rows(lacks, x).transpose(0, 1).flatten(1, 2)[:, used]
            beside = beside + rest.mT @ weighted
            beside_mean = beside_mean + (rest * flat).sum(1)
    scale = max(total, 1e-30)
    hessian, shift, mean, aim = hessian / scale, shift / scale, mean / scale, aim / scale
    beside, beside_mean = beside / scale, beside_mean / scale
    if centred:
        hessian = hessian - mean[:, :, None] * mean[:, None, :]
        shift = shift - (aim - mean)[:, :, None] * mean[:, None, :]
        if missing is not None:
            beside = beside - beside_mean[:, :, None] * mean[:, None, :]
    return _Moments(hessian, shift, mean, aim, beside, beside_mean)


def _compensated(use: WeightUse, weight: Tensor, moments: _Moments) -> Tensor:
    """The weight that on the inputs as they are comes closest to the exact outputs."""
    matrix = use.matrix(weight, casts=False).double()
    hessian = moments.hessian.double()
    ridge = _RIDGE * hessian.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    damped = hessian + torch.diag_embed(ridge[:, None].expand(-1, hessian.shape[1]))
    moved = torch.linalg.solve(
        damped, (matrix @ moments.shift.double() + moments.beside.double()).mT
    ).mT
    return use.pull_back(matrix + moved, weight.shape).to(weight.dtype).contiguous()
