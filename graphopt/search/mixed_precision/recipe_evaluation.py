"""Whole recipes, measured: all layers compressed at once, corrected, and run on data."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphopt.errors import InputError
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.passes import CorrectBias, ReestimateBatchNorm
from graphopt.passes.pass_manager import run_passes
from graphopt.run.batches import Batch
from graphopt.run.interpreter import Hook
from graphopt.run.partial_rerun import Downstream, PartialRerun, RerunPlan
from graphopt.search.mixed_precision.exact import Bench
from graphopt.search.mixed_precision.layers import Layer, weights_of
from graphopt.search.mixed_precision.metrics import measure

__all__ = ["RecipeEvaluator"]


class RecipeEvaluator:
    """Measures choices on fixed data.

    Args:
        program: The uncompressed program.
        bench: Candidates, stored forms, ranges; the correction is applied to the whole model.
        batches: Inputs of one call each.
    """

    def __init__(self, program: Program, bench: Bench, batches: Sequence[Batch]) -> None:
        self.program = program
        self.bench = bench
        self.batches = list(batches)
        self.count = 0
        self.reference = [PartialRerun(bench.plan, batch).reference() for batch in self.batches]
        self._known: dict[tuple[str, ...], list[float]] = {}

    def measure(self, names: Sequence[str]) -> float:
        """The first metric's mean over batches for one candidate's name per layer."""
        values = self._values(names)
        return sum(values) / len(values)

    def _values(self, names: Sequence[str]) -> list[float]:
        key = tuple(names)
        if key not in self._known:
            self.count += 1
            self._known[key] = self._measured(names)
        return self._known[key]

    def is_better(self, names: Sequence[str], than: Sequence[str]) -> bool:
        """Whether a choice has the smaller loss, by more than chance.

        The mean must be smaller, and the batches' differences must have a mean below 0 by at least
        its standard error: where few samples decide, what looks better often is not on others.
        """
        if not self.loss(names) < self.loss(than):
            return False
        loss = self.bench.metrics[0].loss
        pairs = zip(self._values(names), self._values(than), strict=True)
        change = [loss(new) - loss(old) for new, old in pairs]
        mean = statistics.fmean(change)
        if len(change) < 2:
            return mean < 0
        return mean + statistics.stdev(change) / len(change) ** 0.5 < 0

    def loss(self, names: Sequence[str]) -> float:
        """The loss of `measure`."""
        return self.bench.metrics[0].loss(self.measure(names))

    def dense(self, layer: Layer, name: str) -> Tensor | None:
        """The weight that a candidate stands for, None where it stays as it is."""
        form = self.bench.forms[layer.name].get(name)
        return None if form is None else form.dense()

    def compressed(self, names: Sequence[str]) -> CapturedModule:
        """A copy of the program with dense stand-ins of the chosen candidates, corrected."""
        work = self.program.copy()
        gm = work.graph_module
        edit = Editor(gm)
        weights = {weight.name: weight for weight in weights_of(gm)}
        changed = set()
        for layer, name in zip(self.bench.layers, names, strict=True):
            dense = self.dense(layer, name)
            if dense is not None:
                first, *tied = weights[layer.name].nodes
                edit.set_value(first, dense, tied=tied)
                changed.add(layer.name)
        exact, wanted = self.program.graph_module, self.bench.correction
        if wanted is None:
            return gm
        data = [_as_data(batch) for batch in self.batches]
        if wanted in ("statistics", "batch_norm"):
            run_passes(gm, [ReestimateBatchNorm(data, exact)])
        if wanted in ("statistics", "bias"):
            run_passes(gm, [CorrectBias(data, exact, frozenset(changed))])
        return gm

    def hooks(self, plan: RerunPlan, names: Sequence[str]) -> Mapping[torch.fx.Node, Hook]:
        """Roundings of activations that the chosen candidates ask for."""
        hooks: dict[torch.fx.Node, Hook] = {}
        for layer, name in zip(self.bench.layers, names, strict=True):
            candidate = self.bench.candidates.get(name)
            if candidate is not None and candidate.activation is not None:
                own = self.bench.statistics.hooks(layer, candidate, None, plan)
                hooks |= own.get("before", {})
        return hooks

    def _measured(self, names: Sequence[str]) -> list[float]:
        gm = self.compressed(names)
        plan = RerunPlan(gm)
        weights = [weight for weight in weights_of(gm) if weight.name in self._layers]
        below: Downstream = plan.downstream([node for weight in weights for node in weight.nodes])
        values = {node: weight.tensor for weight in weights for node in weight.nodes}
        before = self.hooks(plan, names)
        measured = []
        for batch, reference in zip(self.batches, self.reference, strict=True):
            outputs = PartialRerun(plan, batch).outputs(below, values, before=before)
            measured.append(measure(self.bench.metrics[0], outputs, reference))
        return measured

    @property
    def _layers(self) -> set[str]:
        return {layer.name for layer in self.bench.layers}


def _as_data(batch: Batch) -> object:
    args, kwargs = batch
    if args and kwargs:
        raise InputError("corrections take positional or keyword inputs, not both in one call")
    return dict(kwargs) if kwargs else tuple(args)
