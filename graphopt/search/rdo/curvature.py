"""How much the loss feels a change at a block's outputs, and at the positions of a layer's output.

With u random and E[uuᵀ] the curvature of the metric at the model's outputs z (as in
`graphopt.mixed_precision.fast`), δ = ∂⟨u, z⟩/∂y is the gradient at an inner value y, and a change Δy
costs `½E[⟨δ, Δy⟩²]` to second order: the Gauss-Newton form of the loss at a block's outputs (Li et
al., BRECQ, arXiv 2102.05426, equation 10, there with the squares apart).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.matrix_form import WeightUse
from graphopt.errors import InputError
from graphopt.fitting.sensitivity import GradientCollector
from graphopt.ir.captured_module import CapturedModule
from graphopt.progress import track
from graphopt.run.batches import Batch
from graphopt.run.interpreter import Interpreter
from graphopt.search.mixed_precision.fast import project

__all__ = ["Curvature", "GradientOptions", "Gradients"]

Gradients = list[list[Tensor]]  # draws × batches, bfloat16


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """How gradients are drawn.

    Attributes:
        metric: "kl", "mse", "psnr" or "cosine".
        draws: Number of u per sample.
        seed: Seed of u.
        memory: Bytes that gradients may take; one block's are held in any case.
        progress: Show a bar; None shows it on a terminal.
    """

    metric: str
    draws: int = 1
    seed: int = 0
    memory: int = 1 << 30
    progress: bool | None = None


class Curvature:
    """Gradients in the exact program.

    Those at the blocks' outputs take as much memory as the outputs of all samples; where that is more
    than `memory`, they are computed for some blocks at a time, with one pass over the data each.

    Args:
        gm: The exact graph.
        batches: Inputs of one call each.
        ends: Output nodes of each block, in order.
        uses: Ops whose positions and rows are weighed.
        options: How gradients are drawn.

    Attributes:
        saliency: Name of an op's node → per batch [batch, positions] the mean squared gradient of its
            output, with mean 1 over each sample.
        rows: Name of an op's node → squared gradient of each output row, summed over positions and
            batches, the mean over the samples of each, [groups · rows].

    Raises:
        InputError: No floating-point output depends on the nodes.
    """

    def __init__(
        self,
        gm: CapturedModule,
        batches: Sequence[Batch],
        ends: Sequence[Sequence[fx.Node]],
        uses: Sequence[WeightUse],
        options: GradientOptions,
    ) -> None:
        self._gm, self._batches, self._metric = gm, batches, options.metric
        self._draws, self._seed, self._progress = options.draws, options.seed, options.progress
        self.saliency: dict[str, list[Tensor]] = {}
        self.rows: dict[str, Tensor] = {}
        self._held: dict[str, Gradients] = {}
        self._groups = self._grouped(ends, options.memory)
        self._measure(self._groups[0] if self._groups else [], uses)

    def gradients(self, name: str) -> Gradients:
        """Gradients at a block's output, draws × batches, bfloat16."""
        if name not in self._held:
            group = next(
                nodes for nodes in self._groups if any(node.name == name for node in nodes)
            )
            self._held = {}
            self._measure(group, ())
        return self._held[name]

    def loss(self, changes: Mapping[str, Sequence[Tensor]], batches: Sequence[int]) -> float:
        """`½E[⟨δ, Δy⟩²]` per sample for changes of some nodes, over some batches.

        Args:
            changes: Name of the node → Δy for each of `batches`.
            batches: Their numbers.
        """
        total, samples = 0.0, 0
        known = {name: self.gradients(name) for name in changes}
        for place, number in enumerate(batches):
            for draw in range(self._draws):
                inner = torch.zeros(())
                for name, change in changes.items():
                    product = known[name][draw][number].float() * change[place].float()
                    inner = inner + product.reshape(product.shape[0], -1).sum(1)
                total += float(inner.double().square().sum())
                samples += inner.numel()
        return 0.5 * total / max(samples, 1)

    def weighting(self, name: str, number: int, kind: str) -> Tensor | None:
        """What the elements of a node's error count in one batch, with mean 1; None for all alike."""
        if kind == "none":
            return None
        squares = torch.stack([draw[number].float().square() for draw in self.gradients(name)])
        squares = squares.mean(0)
        if kind == "mean":
            squares = squares.mean(0, keepdim=True).expand_as(squares)
        mean = squares.mean()
        return squares / mean if float(mean) > 0 else None

    def _grouped(self, ends: Sequence[Sequence[fx.Node]], memory: int) -> list[list[fx.Node]]:
        """Blocks whose gradients are held together."""
        every = list(dict.fromkeys(node for block in ends for node in block))
        if not every:
            return []
        runner = _Watched(self._gm, set(every), set())
        with torch.no_grad():
            runner.run(self._batches[0])
        factor = 2 * self._draws * len(self._batches)  # bfloat16
        groups: list[list[fx.Node]] = []
        left = 0
        for block in ends:
            fresh = [node for node in block if not groups or node not in groups[-1]]
            size = factor * sum(runner.kept[node.name].numel() for node in fresh)
            if not groups or size > left:
                # what a block needs is in one group
                fresh = list(block)
                size = factor * sum(runner.kept[node.name].numel() for node in fresh)
                groups.append([])
                left = memory
            groups[-1] += fresh
            left -= size
        return groups

    def _measure(self, ends: Sequence[fx.Node], uses: Sequence[WeightUse]) -> None:
        """Run all batches forward and backward."""
        generator = torch.Generator().manual_seed(self._seed)
        collector = GradientCollector(squares=False, positions=True)
        points = {*ends, *(use.node for use in uses)}
        data: dict[str, fx.Node] = {}
        for use in uses:
            read = use.node.args[use.form.data]
            assert isinstance(read, fx.Node)
            data[use.node.name] = read
        names = [node.name for node in ends]
        self._held = {name: [[] for _ in range(self._draws)] for name in names}
        count = len(self._batches)
        for batch in track(self._batches, "gradients", count, enabled=self._progress):
            runner = _Watched(self._gm, points, set(data.values()))
            with torch.enable_grad():
                values = runner.run(batch)
                results = [v for v in values if v.is_floating_point() and v.requires_grad]
                if not results:
                    raise InputError("no floating-point output depends on a layer")
                for draw in range(self._draws):
                    total = project(results, self._metric, generator)
                    known = list(runner.kept)
                    gradients = torch.autograd.grad(
                        total,
                        [runner.kept[name] for name in known],
                        allow_unused=True,
                        retain_graph=draw + 1 < self._draws,
                    )
                    arrived = dict(zip(known, gradients, strict=True))
                    for name in names:
                        gradient = arrived.get(name)
                        gradient = (
                            torch.zeros_like(runner.kept[name]) if gradient is None else gradient
                        )
                        self._held[name][draw].append(gradient.detach().to(torch.bfloat16))
                    for use in uses if draw == 0 else ():
                        gradient = arrived.get(use.node.name)
                        if gradient is not None:
                            self._weigh(
                                use, collector, gradient, runner.seen[data[use.node.name].name]
                            )
        self.saliency.update(collector.saliency)

    def _weigh(
        self, use: WeightUse, collector: GradientCollector, gradient: Tensor, x: Tensor
    ) -> None:
        name = use.node.name
        collector.record(name, use, torch.Size(), x, gradient)
        squares = use.form.rows(gradient.detach().float(), x).square()
        self.rows[name] = self.rows.get(name, 0) + squares.mean(0).sum(1).reshape(-1)


class _Watched:
    """Keeps some values of a run as points where gradients arrive."""

    def __init__(self, gm: CapturedModule, points: set[fx.Node], inputs: set[fx.Node]) -> None:
        self.interpreter = Interpreter(gm)
        self.points, self.inputs = points, inputs
        self.kept: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}

    def run(self, batch: Batch) -> list[Tensor]:
        """Tensors that the graph gives for one call."""
        hooks = {node: partial(self._watch, node) for node in (*self.points, *self.inputs)}
        outputs = self.interpreter.run(batch, hooks)
        return [output for output in outputs if isinstance(output, Tensor)]

    def _watch(self, node: fx.Node, value: Any) -> Any:
        if node in self.inputs and isinstance(value, Tensor):
            self.seen[node.name] = value.detach()
        if node in self.points and isinstance(value, Tensor) and value.is_floating_point():
            if not value.requires_grad:
                value = value.detach().requires_grad_()
            self.kept[node.name] = value
        return value
