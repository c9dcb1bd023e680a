"""Fast sensitivities: one forward and one backward pass for all layers and candidates.

With δ the gradient of ⟨u, z⟩ at a layer's output, u random with E[uuᵀ] the curvature of the metric at
the model's outputs, `a = ⟨δ, ΔW·x⟩` of a sample is the first-order change of ⟨u, z⟩, and ½E[a²] the
second-order change of the metric. For the KL divergence E[uuᵀ] = diag(p) − ppᵀ gives the Fisher
matrix (Martens, arXiv 1412.1193, section 9), for squared errors u ~ N(0, I). The vectors of
all layers together give the cross terms: the loss of a whole recipe is `½E[(Σ a)²]` (the idea of
CLADO, arXiv 2307.05657, without its forward passes per pair).
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, fx

from graphopt.analysis.matrix_form import WeightUse
from graphopt.errors import InputError
from graphopt.run.batches import Batch, flat_inputs
from graphopt.run.partial_rerun import RerunPlan
from graphopt.search.mixed_precision.exact import Bench
from graphopt.search.mixed_precision.layer_statistics import CorrectionPoint, correction_point
from graphopt.search.mixed_precision.layers import Layer, uses_of
from graphopt.search.mixed_precision.records import Vectors

__all__ = ["FAST_METRICS", "draw_vectors"]

_log = logging.getLogger(__name__)
FAST_METRICS = ("psnr", "mse", "kl", "cosine")
_CHUNK = 1 << 24  # elements of weight gradients that exist at a time


def draw_vectors(bench: Bench, batch: Batch, *, draws: int, seed: int, group: int = 1) -> Vectors:
    """The vectors of one batch, scaled so that a recipe's loss is `½E[(Σ a)²]`.

    Since u has mean 0 and is drawn anew for each sample, the sum over a group of samples says on
    average as much as its members; a weight's gradient is then computed per group.

    Args:
        bench: What to measure; the first metric decides u.
        batch: Inputs of one call.
        draws: Number of u per sample.
        seed: Seed of u.
        group: Samples of a vector.

    Returns:
        [draws × groups, candidates of all layers in order], float32.

    Raises:
        InputError: The metric has no curvature at equal outputs, or there is no floating output.
    """
    metric = bench.metrics[0].name
    if metric not in FAST_METRICS:
        raise InputError(f"the fast mode predicts {list(FAST_METRICS)}, not {metric!r}")
    generator = torch.Generator().manual_seed(seed)
    uses = uses_of(bench.plan.gm, [layer.name for layer in bench.layers])
    nodes = {name for layer in bench.layers for name in layer.nodes}
    with torch.enable_grad():
        values, outputs = _forward(bench.plan, batch, nodes)
    changes = [
        _Changes(bench, layer, uses.get(layer.name), values, group) for layer in bench.layers
    ]
    leaves = [tensor for tensor in values.at.values() if tensor.is_leaf]
    rows: list[Tensor] = []
    for draw in range(draws):
        parts = [change.nothing() for change in changes]
        # gradients are used as they come, and not kept
        handles = [
            values.at[point].register_hook(partial(change.take, part, op, point))
            for change, part in zip(changes, parts, strict=True)
            for op, point in change.points()
        ]
        with torch.enable_grad():
            total = project(outputs, metric, generator)
        torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=draw + 1 < draws)
        for handle in handles:
            handle.remove()
        sizes = torch.tensor([len(part) for part in torch.arange(values.samples).split(group)])
        rows.append(torch.cat(parts, 1) / sizes[:, None].sqrt())
    return torch.cat(rows).numpy().astype(np.float32)


class _Values:
    def __init__(self, samples: int) -> None:
        self.samples = samples
        # outputs of the layers' ops, or their items, which are part of the autograd graph
        self.at: dict[fx.Node, Tensor] = {}
        self.data: dict[fx.Node, list[tuple[fx.Node, object]]] = {}  # what each op reads

    def points(self, op: fx.Node) -> list[fx.Node]:
        """Where an op's output can be changed: the op, or the items of its tuple."""
        return [op] if op in self.at else [user for user in op.users if user in self.at]


def _forward(plan: RerunPlan, batch: Batch, wanted: set[str]) -> tuple[_Values, list[Tensor]]:
    """Run the graph with an autograd graph that begins at the first layer."""
    inputs = flat_inputs(plan.gm, batch)
    tensors = [tensor for tensor in inputs if isinstance(tensor, Tensor) and tensor.ndim]
    values = _Values(int(tensors[0].shape[0]) if tensors else 1)
    read = {node: node.all_input_nodes for node in plan.nodes if node.name in wanted}
    seen: dict[fx.Node, object] = {}
    watched = {used for nodes in read.values() for used in nodes}

    def watch(node: fx.Node, value: object) -> object:
        if node.op == "get_attr" and isinstance(value, Tensor):
            value = value.detach()
        item = node.target is operator.getitem and node.all_input_nodes[0].name in wanted
        is_point = node.name in wanted or item
        if is_point and isinstance(value, Tensor) and value.is_floating_point():
            if not value.requires_grad:
                value = value.detach().requires_grad_()
            values.at[node] = value
        if node in watched:
            seen[node] = value.detach() if isinstance(value, Tensor) else value
        return value

    results = plan.run(batch, {node: partial(watch, node) for node in plan.nodes})
    values.data = {node: [(used, seen[used]) for used in nodes] for node, nodes in read.items()}
    outputs = [
        output
        for output in results
        if isinstance(output, Tensor) and output.is_floating_point() and output.requires_grad
    ]
    if not outputs:
        raise InputError("no floating-point output depends on a layer")
    return values, outputs


def project(outputs: Sequence[Tensor], metric: str, generator: torch.Generator) -> Tensor:
    total = outputs[0].new_zeros(())
    for output in outputs:
        direction = _direction(output.detach(), metric, generator)
        total = total + (output * direction.to(output.dtype)).sum() / len(outputs) ** 0.5
    return total


def _direction(y: Tensor, metric: str, generator: torch.Generator) -> Tensor:
    """A draw u for which ½E[⟨u, Δy⟩²] is the metric's loss of a sample for small Δy."""
    y = y.float()
    masked = ~torch.isfinite(y)
    if bool(masked.any()):
        # what is masked, by -inf for instance, does not move with the weights
        held = y.masked_fill(masked, -1e30 if metric == "kl" else 0.0)
        return _direction(held, metric, generator).masked_fill(masked, 0.0)
    if metric == "kl":
        # covariance diag(p) − ppᵀ like onehot(y) − p, but confident samples have their say too
        p = y.softmax(-1)
        signs = 2.0 * torch.randint(2, y.shape, generator=generator).to(y.device) - 1
        root = p.sqrt() * signs
        positions = max(y[0].numel() // y.shape[-1], 1)
        return (root - p * root.sum(-1, keepdim=True)) / positions**0.5
    drawn = torch.randn(y.shape, generator=generator).to(y.device)
    if metric == "cosine":
        length = torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min(1e-12)
        unit = y / length
        positions = max(y[0].numel() // y.shape[-1], 1)
        across = drawn - (drawn * unit).sum(-1, keepdim=True) * unit
        return across / length / positions**0.5
    size = max(y[0].numel(), 1)
    scale = (2 / size) ** 0.5
    if metric == "psnr":
        scale /= float(y.square().max().clamp_min(1e-30)) ** 0.5
    return drawn * scale


class _Changes:
    """What the candidates of one layer change, and the vectors that a gradient makes of it."""

    def __init__(
        self, bench: Bench, layer: Layer, use: WeightUse | None, values: _Values, group: int
    ) -> None:
        self.layer = layer
        self.plan = bench.plan
        self.values = values
        self.forms = bench.forms[layer.name]
        self.correction_point: CorrectionPoint | None = correction_point(
            bench.plan, layer, bench.correction
        )
        self.below = bench.belows[layer.name]
        activations = [bench.candidates[name].activation for name in layer.candidates]
        hooked = any(activation is not None for activation in activations)
        self.bench = bench
        self.group = group
        self.use = use if use is not None and _is_plain(use) and not hooked else None

    def nothing(self) -> Tensor:
        """Zeros, [groups, candidates]."""
        return torch.zeros(-(-self.values.samples // self.group), len(self.layer.candidates))

    def points(self) -> list[tuple[fx.Node, fx.Node]]:
        """The layer's ops and where their outputs can be changed."""
        ops = [self.plan.by_name[name] for name in self.layer.nodes]
        return [(op, point) for op in ops for point in self.values.points(op)]

    def take(self, total: Tensor, op: fx.Node, point: fx.Node, gradient: Tensor) -> None:
        """Add what a gradient says to [groups, candidates], sums over samples."""
        samples = self.values.samples
        if self.use is not None and gradient.shape[0] == samples:
            total += self._by_weight(op, self.use, gradient)
        else:
            total += self._by_output(op, point, gradient, samples)

    @torch.no_grad()
    def _by_weight(self, node: fx.Node, use: WeightUse, gradient: Tensor) -> Tensor:
        """⟨G, ΔW⟩ with G the weight's gradient over a group of samples."""
        x = next(v for n, v in self.values.data[node] if n is node.args[use.form.data])
        assert isinstance(x, Tensor)
        x, gradient = x.float(), gradient.float()
        deltas = self._deltas(use)
        shape = use.operand(self._weight(), casts=False).shape
        products = []
        step = max(1, _CHUNK // max(deltas.shape[1], 1)) * self.group
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            products += [
                gradients @ deltas.mT
                for gradients in _weight_gradients(use, x[part], gradient[part], self.group)
            ]
        vectors = torch.cat(products)
        if self.correction_point is None:
            return vectors
        z = self.values.at[node].detach().float()
        axes = [axis for axis in range(1, z.ndim) if axis != self.correction_point.axis % z.ndim]
        mean = _mean_change(use, x, deltas.reshape(-1, *shape))
        vectors -= _group_sums(_summed(gradient, axes), self.group) @ mean.mT
        if self.correction_point.gains:
            centred = z - z.mean([0, *axes], keepdim=True)
            (cross,) = _weight_gradients(use, x, centred, len(x))
            cross = cross.reshape(shape[0], -1)
            slope = (deltas.reshape(len(deltas), shape[0], -1) * cross).sum(-1)
            slope /= centred.square().sum([0, *axes]).clamp_min(1e-30)
            vectors -= _group_sums(_summed(gradient * centred, axes), self.group) @ slope.mT
        return vectors

    def _weight(self) -> Tensor:
        weight = self.plan.call(self.below.sources[0], lambda node: node)
        assert isinstance(weight, Tensor)
        return weight.detach()

    def _deltas(self, use: WeightUse) -> Tensor:
        """What each candidate changes, [candidates, weights] in the order of the op's matrix."""
        weight = self._weight()
        kept = torch.zeros_like(weight)
        changes = (kept if form is None else form.dense() - weight for form in self.forms.values())
        return torch.stack(
            [use.matrix(change, casts=False).float().flatten() for change in changes]
        )

    @torch.no_grad()
    def _by_output(self, op: fx.Node, point: fx.Node, gradient: Tensor, samples: int) -> Tensor:
        """⟨δ, Δz⟩ with the op run for each candidate."""
        exact = self.values.at[point].detach()
        local = self.plan.downstream(self.below.sources, point)
        known = dict(self.values.data[op])
        columns = []
        for name, form in self.forms.items():
            candidate = self.bench.candidates[name]
            if candidate.is_kept:
                columns.append(torch.zeros(samples))
                continue
            values: dict[fx.Node, object] = dict(known)
            if form is not None:
                values |= dict.fromkeys(local.sources, form.dense())
            hooks = self.bench.statistics.hooks(self.layer, candidate, None, self.plan)
            for node in local.nodes:
                if node in (op, point) or node in self.plan.constant:
                    values[node] = self._call(node, values, hooks.get("before", {}))
            change = (values[point] - exact).float()  # type: ignore[operator]
            if self.correction_point is not None:
                change = _residual(change, exact.float(), self.correction_point)
            columns.append(_per_sample(gradient.float() * change, samples))
        return _group_sums(torch.stack(columns, 1), self.group)

    def _call(
        self, node: fx.Node, values: dict[fx.Node, object], before: Mapping[fx.Node, object]
    ) -> object:
        if node not in before:
            return self.plan.call(node, lambda operand: self._value(operand, values))
        hook = before[node]
        moving = next(
            operand for operand in node.all_input_nodes if operand not in self.plan.constant
        )
        changed = hook(self._value(moving, values))  # type: ignore[operator]
        return self.plan.call(
            node,
            lambda operand: changed if operand is moving else self._value(operand, values),
        )

    def _value(self, node: fx.Node, values: dict[fx.Node, object]) -> object:
        if node not in values:
            values[node] = self.plan.call(node, lambda operand: self._value(operand, values))
        return values[node]


def _weight_gradients(use: WeightUse, x: Tensor, gradient: Tensor, group: int) -> Iterator[Tensor]:
    """Gradients of the op's weight over groups of samples, [some groups, weights] at a time."""
    form = use.form
    if form.kind != "conv":
        rows, columns = form.rows(gradient, x)[:, 0], form.columns(x)[:, 0]
        whole = len(rows) // group * group
        if whole:
            left, right = (
                matrix[:whole].unflatten(0, (-1, group)).flatten(1, 2) for matrix in (rows, columns)
            )
            yield (left.mT @ right).flatten(1)
        if whole < len(rows):
            left, right = rows[whole:].flatten(0, 1), columns[whole:].flatten(0, 1)
            yield (left.mT @ right).reshape(1, -1)
        return
    for own, data in zip(gradient.split(group), x.split(group), strict=True):
        yield form.convolution_gradient(own, data).reshape(1, -1)


def _mean_change(use: WeightUse, x: Tensor, deltas: Tensor) -> Tensor:
    """Mean over samples and positions of what candidates change, [candidates, channels]."""
    form = use.form
    if form.kind != "conv":
        return torch.matmul(deltas, x.reshape(-1, x.shape[-1]).mean(0))
    center = x.mean(0, keepdim=True)
    padding = [before for before, _ in form.padding]
    return torch.stack(
        [
            torch.convolution(
                center,
                delta,
                None,
                form.stride,
                padding,
                form.dilation,
                False,
                [0] * len(padding),
                form.groups,
            )[0]
            .flatten(1)
            .mean(1)
            for delta in deltas
        ]
    )


def _summed(values: Tensor, axes: Sequence[int]) -> Tensor:
    return values.sum(list(axes)) if axes else values


def _group_sums(values: Tensor, group: int) -> Tensor:
    """Sums over groups of the first dimension, the last group being what is left."""
    return torch.stack([part.sum(0) for part in values.split(group)])


def _is_plain(use: WeightUse) -> bool:
    """Whether the gradient of a group of samples is one kernel or matrix product."""
    return use.form.is_even_convolution or use.form.kind in ("linear", "right", "left")


def _residual(change: Tensor, exact: Tensor, point: CorrectionPoint) -> Tensor:
    """A change without what per-channel means (and gains) take up."""
    axes = [axis for axis in range(change.ndim) if axis != point.axis % change.ndim]
    rest = change - change.mean(axes, keepdim=True)
    if not point.gains:
        return rest
    centred = exact - exact.mean(axes, keepdim=True)
    slope = (rest * centred).mean(axes, keepdim=True)
    return rest - slope / centred.square().mean(axes, keepdim=True).clamp_min(1e-30) * centred


def _per_sample(product: Tensor, samples: int) -> Tensor:
    if product.ndim and product.shape[0] % samples == 0:
        return product.reshape(samples, -1).sum(1)
    _log.info("an output of shape %s does not tell samples apart", tuple(product.shape))
    return product.sum().expand(samples) / samples**0.5
