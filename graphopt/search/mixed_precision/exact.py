"""Exact sensitivities: each candidate of each layer alone, measured at the model's outputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graphopt.exclusive import exclusively
from graphopt.ir.program import Program
from graphopt.run.batches import Batch
from graphopt.run.partial_rerun import PartialRerun, RerunPlan
from graphopt.search.mixed_precision.batched_candidates import CandidateBatcher
from graphopt.search.mixed_precision.layer_statistics import (
    CandidateGraph,
    Correction,
    LayerStatistics,
    collect_statistics,
    correction_point,
)
from graphopt.search.mixed_precision.layers import Layer, stored_forms, weights_of
from graphopt.search.mixed_precision.metrics import Metric, measure
from graphopt.search.mixed_precision.records import Header

__all__ = ["Bench", "Values", "make_bench", "measure_batch"]

Values = dict[str, dict[str, float]]  # candidate → metric → value


@dataclass(frozen=True)
class Bench(CandidateGraph):
    """Everything that measuring a batch needs.

    Attributes:
        statistics: Ranges and corrections over all data.
        metrics: What is measured.
        correction: What will be corrected afterwards, or None.
        batcher: Runs candidates side by side where that is possible.
    """

    statistics: LayerStatistics
    metrics: tuple[Metric, ...]
    correction: Correction | None
    batcher: CandidateBatcher


@exclusively
def make_bench(
    program: Program,
    header: Header,
    metrics: tuple[Metric, ...],
    batches: Sequence[Batch],
    *,
    statistics: LayerStatistics | None = None,
    progress: bool | None = None,
) -> Bench:
    """Everything that measuring needs.

    Args:
        program: The uncompressed program.
        header: Layers, candidates and settings.
        metrics: What is measured.
        batches: All data, for ranges of activations and, unless the mode is "fast", corrections of
            single layers.
        statistics: Those, where they are known already.
        progress: Show bars; None shows them on a terminal.
    """
    gm = program.graph_module
    plan = RerunPlan(gm)
    forms = stored_forms(gm, header.layers, header.candidates, seed=header.seed, progress=progress)
    weights = {weight.name: weight for weight in weights_of(gm)}
    belows = {layer.name: plan.downstream(weights[layer.name].nodes) for layer in header.layers}
    # a program that was saved and loaded may call its ops otherwise
    layers = tuple(
        replace(layer, nodes=tuple(dict.fromkeys(use.node for use in weights[layer.name].uses)))
        for layer in header.layers
    )
    correction: Any = header.correction
    if statistics is None:
        graph = CandidateGraph(plan, layers, header.candidates, forms, belows)
        asked = None if header.mode == "fast" else correction
        statistics = collect_statistics(graph, batches, asked, progress=progress)
    batcher = CandidateBatcher(plan)
    return Bench(
        plan, layers, header.candidates, forms, belows, statistics, metrics, correction, batcher
    )


def measure_batch(
    bench: Bench, batch: Batch, skip: Collection[str] = ()
) -> Iterator[tuple[str, Values, bool]]:
    """Measure every layer on one batch.

    The result is that of compressing the layer in a copy of the model and running it all; only what
    depends on the layer is run, though, and candidates side by side where they are small.

    Args:
        bench: What to measure.
        batch: Inputs of one call.
        skip: Layers that are known already.

    Yields:
        Layer, candidate → metric → value, and whether the batch misses the layer: no output changes
        with any candidate's weight, as where nothing is routed to an expert.
    """
    layers: Sequence[Layer] = [layer for layer in bench.layers if layer.name not in skip]
    if not layers:
        return
    run = PartialRerun(bench.plan, batch)
    reference = run.reference()
    for layer in layers:
        below = bench.belows[layer.name]
        run.advance(below.first)
        point = correction_point(bench.plan, layer, bench.correction)
        changed = [name for name in layer.candidates if not bench.candidates[name].is_kept]
        single = len(layer.nodes) == 1
        op = bench.plan.by_name[layer.nodes[0]]
        width = bench.batcher.width(run, below, op, len(changed)) if single else 1
        by_candidate: dict[str, list[Tensor]] = {}
        for start in range(0, len(changed), width):
            names = changed[start : start + width]
            weights, hooks = [], []
            for name in names:
                form = bench.forms[layer.name][name]
                dense = run.exact(below.sources[0]) if form is None else form.dense()
                weights.append(dict.fromkeys(below.sources, dense))
                hooks.append(
                    bench.statistics.hooks(layer, bench.candidates[name], point, bench.plan)
                )
            outputs = bench.batcher.outputs(run, below, op, weights, hooks) if width > 1 else None
            if outputs is None:
                pairs = zip(weights, hooks, strict=True)
                outputs = [run.outputs(below, weight, **own) for weight, own in pairs]
            by_candidate |= zip(names, outputs, strict=True)
        values = {
            name: {
                metric.name: measure(metric, by_candidate.get(name, reference), reference)
                for metric in bench.metrics
            }
            for name in layer.candidates
        }
        missed = all(_equal(outputs, reference) for outputs in by_candidate.values())
        yield layer.name, values, bool(changed) and missed


def _equal(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> bool:
    return all(
        torch.equal(got, want) or bool(((got == want) | (got.isnan() & want.isnan())).all())
        for got, want in zip(outputs, reference, strict=True)
    )
