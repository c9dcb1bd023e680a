"""Fit palettes layer by layer to the outputs of the uncompressed program.

Every layer is fitted with the inputs that it will get, those of the already compressed layers
before it. Its target is the output of the uncompressed layer on the uncompressed inputs: the
regression `W* = W + α·W·E[(x − x̂)x̂ᵀ]·(E[x̂x̂ᵀ] + λI)⁻¹` (the asymmetric calibration of GPTAQ, Li et al.,
arXiv 2504.02692, equation 6, with a ridge) makes up for what the inputs have lost, and a bias for
the mean. Positions count by the square root of their saliency, so that padding does not count.
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
from graphopt.matrix_form import WeightUse, weight_uses
from graphopt.program import Program
from graphopt.progress import track
from graphopt.schemes.palettize import PalettizedWeight, palettize
from graphopt.schemes.palettize_outputs import palettize_to_outputs
from graphopt.weights import WeightTensor, find_weights

__all__ = ["OutputFit", "fit_to_outputs"]

_RIDGE = 0.3  # λ relative to the mean diagonal
_POSITIONS = 16_384  # sampled for a layer's moments, or more for long columns
_POSITIONS_PER_COLUMN = 8
_aten = torch.ops.aten


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


def fit_to_outputs(
    annotated: Program,
    batches: Sequence[Batch],
    known: Mapping[str, PalettizedWeight],
    saliency: Mapping[str, Sequence[Tensor]],
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
            _fit(edit, weight, use, run, reference, twins[node], saliency, result,
                 correct_bias, seed)  # fmt: skip
        run.step(node)
        reference.step(twins[node])
    return result


def _fit(
    edit: Editor, weight: WeightTensor, use: WeightUse, run: LayerwiseRun, reference: LayerwiseRun,
    twin: fx.Node, saliency: Mapping[str, Sequence[Tensor]], result: OutputFit, correct_bias: bool, seed: int,
) -> None:  # fmt: skip
    annotation = palette_annotation(weight.nodes[0])
    assert annotation is not None
    inputs, wanted = use.node.args[use.form.data], twin.args[use.form.data]
    assert isinstance(inputs, fx.Node)
    assert isinstance(wanted, fx.Node)
    original = weight.tensor.detach()
    if use.form.kind == "lookup":
        # how often a row was seen says little about the text to come: all rows count alike
        _keep(edit, weight, _plain(weight, None, seed), result)
        return
    bias = _own_bias(use.node) if correct_bias else None
    moments = _moments(
        use, run.values(inputs), reference.values(wanted), saliency.get(use.node.name),
        centred=bias is not None, seed=seed,
    )  # fmt: skip
    target = _compensated(use, original, moments)
    found = palettize_to_outputs(
        target, annotation.spec, use, moments.hessian, output_axis=annotation.output_axis,
        seed=seed,
    )  # fmt: skip
    if found is None:
        result.fallbacks[weight.name] = (
            "its tables do not follow the rows and columns of its matrix"
        )
        spread = moments.hessian.diagonal(dim1=1, dim2=2)[:, None, :].expand_as(
            use.matrix(original)
        )
        importance = use.pull_back(spread.contiguous(), original.shape).contiguous()
        found = _plain(weight, importance, seed)
    _keep(edit, weight, found, result)
    if bias is not None:
        dense = use.matrix(found.dense(), casts=False).double()
        exact = use.matrix(original, casts=False).double()
        change = (
            exact @ moments.wanted.double()[..., None] - dense @ moments.mean.double()[..., None]
        )
        old = edit.value(bias).detach()
        corrected = (old.double() + change.reshape(-1)).to(old.dtype)
        edit.set_value(bias, corrected)
        result.biases[str(bias.target)] = corrected


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
    saliency: Sequence[Tensor] | None, *, centred: bool, seed: int,
) -> _Moments:  # fmt: skip
    hessian = shift = mean = aim = torch.zeros(())
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
    scale = max(total, 1e-30)
    hessian, shift, mean, aim = hessian / scale, shift / scale, mean / scale, aim / scale
    if centred:
        hessian = hessian - mean[:, :, None] * mean[:, None, :]
        shift = shift - (aim - mean)[:, :, None] * mean[:, None, :]
    return _Moments(hessian, shift, mean, aim)


def _compensated(use: WeightUse, weight: Tensor, moments: _Moments) -> Tensor:
    """The weight that on the inputs as they are comes closest to the exact outputs."""
    matrix = use.matrix(weight, casts=False).double()
    hessian = moments.hessian.double()
    ridge = _RIDGE * hessian.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    damped = hessian + torch.diag_embed(ridge[:, None].expand(-1, hessian.shape[1]))
    moved = torch.linalg.solve(damped, (matrix @ moments.shift.double()).mT).mT
    return use.pull_back(matrix + moved, weight.shape).to(weight.dtype).contiguous()
