"""How much the loss feels a change at a block's outputs, and at the positions of a layer's output.

With u random and E[uuᵀ] the curvature of the metric at the model's outputs z (as in
`graphopt.mixed_precision.fast`), δ = ∂⟨u, z⟩/∂y is the gradient at an inner value y, and a change Δy
costs `½E[⟨δ, Δy⟩²]` to second order: the Gauss-Newton form of the loss at a block's outputs (Li et
al., BRECQ, arXiv 2102.05426, equation 10, there with the squares apart).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.captured_module import CapturedModule
from graphopt.errors import InputError
from graphopt.layerwise import Batch, flat_inputs
from graphopt.matrix_form import WeightUse
from graphopt.mixed_precision.fast import project
from graphopt.progress import track
from graphopt.sensitivity import GradientCollector

__all__ = ["Curvature", "Gradients", "measure_curvature"]

Gradients = list[list[Tensor]]  # draws × batches, bfloat16


@dataclass(frozen=True)
class Curvature:
    """Gradients in the exact program.

    Attributes:
        outputs: Name of a node → its gradients.
        saliency: Name of an op's node → per batch [batch, positions] the mean squared gradient of its
            output, with mean 1 over each sample.
        rows: Name of an op's node → squared gradient of each output row, summed over positions and
            batches, the mean over the samples of each, [groups · rows].
    """

    outputs: dict[str, Gradients] = field(default_factory=dict)
    saliency: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def loss(self, changes: Mapping[str, Sequence[Tensor]], batches: Sequence[int]) -> float:
        """`½E[⟨δ, Δy⟩²]` per sample for changes of some nodes, over some batches.

        Args:
            changes: Name of the node → Δy for each of `batches`.
            batches: Their numbers.
        """
        total, samples = 0.0, 0
        for place, number in enumerate(batches):
            draws = len(next(iter(self.outputs[name] for name in changes)))
            for draw in range(draws):
                inner = torch.zeros(())
                for name, found in changes.items():
                    gradient = self.outputs[name][draw][number].float()
                    product = gradient * found[place].float()
                    inner = inner + product.reshape(product.shape[0], -1).sum(1)
                total += float(inner.double().square().sum())
                samples += inner.numel()
        return 0.5 * total / max(samples, 1)

    def weighting(self, name: str, number: int, kind: str) -> Tensor | None:
        """What the elements of a node's error count in one batch, with mean 1; None for all alike."""
        if kind == "none":
            return None
        squares = torch.stack([draw[number].float().square() for draw in self.outputs[name]])
        squares = squares.mean(0)
        if kind == "mean":
            squares = squares.mean(0, keepdim=True).expand_as(squares)
        mean = squares.mean()
        return squares / mean if float(mean) > 0 else None


class _Watched(fx.Interpreter):
    """Runs a graph and keeps some values as points where gradients arrive."""

    def __init__(self, gm: fx.GraphModule, points: set[fx.Node], inputs: set[fx.Node]) -> None:
        super().__init__(gm)
        self.points, self.inputs = points, inputs
        self.kept: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node."""
        result = super().run_node(n)
        if n in self.inputs and isinstance(result, Tensor):
            self.seen[n.name] = result.detach()
        if n in self.points and isinstance(result, Tensor) and result.is_floating_point():
            if not result.requires_grad:
                result = result.detach().requires_grad_()
            self.kept[n.name] = result
        return result


def measure_curvature(
    gm: CapturedModule,
    batches: Sequence[Batch],
    metric: str,
    outputs: Sequence[fx.Node],
    uses: Sequence[WeightUse],
    *,
    draws: int = 1,
    seed: int = 0,
    progress: bool | None = None,
) -> Curvature:
    """Run all batches forward and backward.

    Args:
        gm: The exact graph.
        batches: Inputs of one call each.
        metric: "kl", "mse", "psnr" or "cosine".
        outputs: Nodes whose gradients are kept.
        uses: Ops whose positions are weighed.
        draws: Number of u per sample.
        seed: Seed of u.
        progress: Show a bar; None shows it on a terminal.

    Raises:
        InputError: No floating-point output depends on the nodes.
    """
    found = Curvature()
    generator = torch.Generator().manual_seed(seed)
    points = {*outputs, *(use.node for use in uses)}
    data = {use.node.name: use.node.args[use.form.data] for use in uses}
    for kept in {node.name for node in outputs}:
        found.outputs[kept] = [[] for _ in range(draws)]
    collector = GradientCollector(squares=False, positions=True)
    for batch in track(batches, "gradients", len(batches), enabled=progress):
        inputs = {node for node in data.values() if isinstance(node, fx.Node)}
        runner = _Watched(gm, points, inputs)
        with torch.enable_grad():
            values = _leaves(runner, gm, batch)
            ends = [v for v in values if v.is_floating_point() and v.requires_grad]
            if not ends:
                raise InputError("no floating-point output depends on a layer")
            for draw in range(draws):
                total = project(ends, metric, generator)
                names = list(runner.kept)
                gradients = torch.autograd.grad(
                    total, [runner.kept[name] for name in names], allow_unused=True,
                    retain_graph=draw + 1 < draws,
                )  # fmt: skip
                arrived = dict(zip(names, gradients, strict=True))
                _take(found, collector, arrived, runner, uses, data, draw)
    found.saliency.update(collector.saliency)
    return found


def _leaves(runner: _Watched, gm: CapturedModule, batch: Batch) -> list[Tensor]:
    done = runner.run(*flat_inputs(gm, batch), enable_io_processing=False)
    return [each for each in pytree.tree_leaves(done) if isinstance(each, Tensor)]


def _take(
    found: Curvature, collector: GradientCollector, arrived: Mapping[str, Tensor | None],
    runner: _Watched, uses: Sequence[WeightUse], data: Mapping[str, Any], draw: int,
) -> None:  # fmt: skip
    for name, draws in found.outputs.items():
        gradient = arrived.get(name)
        if gradient is None:
            gradient = torch.zeros_like(runner.kept[name])
        draws[draw].append(gradient.detach().to(torch.bfloat16))
    for use in uses if draw == 0 else ():
        gradient = arrived.get(use.node.name)
        if gradient is not None:
            x = runner.seen[data[use.node.name].name]
            collector.record(use.node.name, use, torch.Size(), x, gradient)
            squares = use.form.rows(gradient.detach().float(), x).square()
            total = squares.mean(0).sum(1).reshape(-1)
            found.rows[use.node.name] = found.rows.get(use.node.name, 0) + total
