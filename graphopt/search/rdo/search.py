"""Rate-distortion optimisation, block by block: what every candidate of every layer costs there."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from graphopt.fitting.layer_target import LayerTarget
from graphopt.run.workers import Task, run_tasks
from graphopt.search.mixed_precision.candidates import Candidate
from graphopt.search.rdo.blockwise_run import BlockwiseRun, GraphBlock
from graphopt.search.rdo.config import RDOConfig
from graphopt.search.rdo.graph_layers import GraphLayer
from graphopt.search.rdo.layer_fit import LayerFit, LooseLayer, fit_layer

__all__ = ["Costs", "cost_of", "search_block"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Costs:
    """What candidates cost, measured block by block.

    Attributes:
        losses: Layer → candidate → loss at the model's outputs.
        bits: Layer → candidate → bits in the config's model of rates.
        choice: Layer → candidate of least loss + λ · bits.
        moves: Candidates that changed because of other layers of their block.
        rate_weight: λ under which they were measured.

    Examples:
        >>> config = graphopt.rdo.RDOConfig.from_dict({"target_bits": 8, "candidates": [4, 8]})
        >>> session = graphopt.rdo.Session.open(model, example, batches, config)
        >>> costs = session.search(rate_weight=1e-9)
        >>> isinstance(costs, Costs), sorted(costs.choice), sorted(costs.losses["0.weight"])
        (True, ['0.weight', '2.weight'], ['int4', 'int8'])
    """

    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    bits: dict[str, dict[str, float]] = field(default_factory=dict)
    choice: dict[str, str] = field(default_factory=dict)
    moves: int = 0
    rate_weight: float = 0.0


def cost_of(layer: GraphLayer, fitted: LayerFit, config: RDOConfig) -> float:
    """Bits of a layer in the config's model of rates."""
    if config.rate == "entropy":
        return fitted.coded
    return float(layer.entry.bits_of(fitted.candidate))


def search_block(
    run: BlockwiseRun,
    block: GraphBlock,
    candidates: Mapping[str, Candidate],
    config: RDOConfig,
    rate_weight: float,
    executor: Any = None,
) -> Iterator[Costs | None]:
    """Measure all candidates of a block's layers and choose; yields None per layer, then the costs.

    Each layer is fitted to the inputs that the chosen forms of the layers before it give. Its
    candidates are compared by what they change at the block's outputs. With all layers in place each
    is tried again: a candidate replaces another if `loss + λ · bits` against the exact outputs is
    smaller for it on the fitting batches and on the held-out ones. That ends when a cycle changes
    nothing.

    Args:
        run: A block-wise run that has come to the block.
        block: The block.
        candidates: By name.
        config: Options.
        rate_weight: λ.
        executor: Where the candidates of a layer are fitted, as for `run_tasks`; None fits one after the
            other.
    """
    costs = Costs(rate_weight=rate_weight)
    forms: dict[str, dict[str, LayerFit]] = {}
    for layer in block.layers:
        name = layer.name
        target = run.target_of(layer, block)
        tasks = _tasks(run, layer, target, candidates, config, rate_weight)
        fits = run_tasks(_fit_candidate, tasks, executor, threads=False)
        forms[name] = dict(zip(layer.entry.candidates, fits, strict=True))
        run.set_weight(layer, *_aim(layer, target))
        numbers = run.fitting
        wanted = run.outputs(block, numbers)
        costs.losses[name], costs.bits[name] = {}, {}
        for candidate, fitted in forms[name].items():
            run.apply(layer, fitted)
            loss = run.loss(block, run.outputs(block, numbers), wanted, numbers)
            costs.losses[name][candidate] = loss
            costs.bits[name][candidate] = cost_of(layer, fitted, config)
        costs.choice[name] = _least(costs, name, rate_weight)
        run.apply(layer, forms[name][costs.choice[name]])
        yield None
    moves = _settle(run, block, forms, costs, config, rate_weight)
    yield replace(costs, moves=moves)


def _tasks(
    run: BlockwiseRun,
    layer: GraphLayer,
    target: LayerTarget | None,
    candidates: Mapping[str, Candidate],
    config: RDOConfig,
    rate_weight: float,
) -> list[Task]:
    loose, importance = LooseLayer.of(layer), run.importance(layer)
    return [
        Task((loose, candidates[name], target, config, rate_weight, importance))
        for name in layer.entry.candidates
    ]


def _fit_candidate(tensors: Mapping[str, Tensor], *arguments: Any) -> LayerFit:
    assert not tensors
    return fit_layer(*arguments)


def _aim(layer: GraphLayer, target: LayerTarget | None) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that all candidates of a layer come close to."""
    exact = layer.weight.tensor.detach()
    if target is None or layer.use is None:
        return exact, None
    if layer.bias_value is None:
        return target.weight, None
    return target.weight, target.bias(layer.bias_value, target.weight)


def _least(costs: Costs, name: str, rate_weight: float) -> str:
    losses, bits = costs.losses[name], costs.bits[name]
    return min(
        losses,
        key=lambda candidate: (losses[candidate] + rate_weight * bits[candidate], bits[candidate]),
    )


def _settle(
    run: BlockwiseRun,
    block: GraphBlock,
    forms: Mapping[str, Mapping[str, LayerFit]],
    costs: Costs,
    config: RDOConfig,
    rate_weight: float,
) -> int:
    if len(block.layers) < 2 or config.blocks.rounds < 2:
        return 0
    wanted = run.exact_outputs(block)
    halves = [part for part in (run.fitting, run.held_out) if part]

    def against_exact() -> list[float]:
        return [
            run.loss(block, run.outputs(block, part), [wanted[n] for n in part], part)
            for part in halves
        ]

    now, moves = against_exact(), 0
    for _ in range(config.blocks.rounds - 1):
        before = moves
        for layer in block.layers:
            name = layer.name
            for candidate in layer.entry.candidates:
                chosen = costs.choice[name]
                if candidate == chosen:
                    continue
                run.apply(layer, forms[name][candidate])
                other = against_exact()
                more = rate_weight * (costs.bits[name][candidate] - costs.bits[name][chosen])
                if all(new + more < old for new, old in zip(other, now, strict=True)):
                    # the others make it worth more, or cost less, than alone
                    gain = now[0] - other[0]
                    costs.losses[name][candidate] = costs.losses[name][chosen] - gain
                    costs.choice[name], now = candidate, other
                    moves += 1
                    block.changed = True
                else:
                    run.apply(layer, forms[name][chosen])
        if moves == before:
            break
    _log.info("block %d: %d moves", block.number, moves)
    return moves
