"""Adaptive rounding of a whole block against the outputs that it should have.

The roundings of all its weights are relaxed (`graphopt.schemes.relaxed`) and trained with Adam on
`Σ c·(y − ŷ)² + γ·Σ(1 − |2h − 1|^β)` while β falls, c being what the loss feels at each element (Li et
al., BRECQ, arXiv 2102.05426, section 3.3). Where activations are rounded, each element stays as it is
with some probability (Wei et al., QDrop, arXiv 2203.05740). A block keeps the outcome only if its
error on held-out batches is smaller than before.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.prepared import ActivationQuantizer
from graphopt.run.block_forward import BlockForward
from graphopt.run.interpreter import Value
from graphopt.schemes.registry import scheme_of
from graphopt.schemes.relaxed import RelaxedWeight
from graphopt.search.mixed_precision.candidates import Candidate
from graphopt.search.rdo.blockwise_run import BlockwiseRun, GraphBlock
from graphopt.search.rdo.config import RoundingOptions
from graphopt.search.rdo.graph_layers import GraphLayer
from graphopt.search.rdo.layer_fit import LayerFit

__all__ = ["Rounded", "round_block"]

_log = logging.getLogger(__name__)
_SCALE_RATE = 0.1  # of the roundings' learning rate
_BIAS_RATE = 0.02
_UNDECIDED = 0.1  # share of a block above which a warning is due
_SETTLE = 0.2  # share of the steps that follow with fixed elements


@dataclass(frozen=True)
class Rounded:
    """What the adaptive rounding of a block did.

    Attributes:
        fitted: Name of the layer → its new form; empty where nothing was gained.
        accepted: Whether the block keeps the outcome.
        before: Loss of the block on held-out batches before.
        after: The same after.
        changed: Elements that went to another level.
        undecided: Elements that were still between their levels when training ended.
    """

    fitted: dict[str, LayerFit]
    accepted: bool
    before: float
    after: float
    changed: int
    undecided: int


def round_block(
    run: BlockwiseRun,
    block: GraphBlock,
    layers: Sequence[tuple[GraphLayer, LayerFit, Tensor]],
    candidates: Mapping[str, Candidate],
    options: RoundingOptions,
    *,
    seed: int,
) -> Iterator[Rounded | None]:
    """Round the weights of a block; yields None after every step, and the outcome last.

    Args:
        run: A block-wise run that has gone through the block.
        block: The block.
        layers: Its layers, their forms so far, and the weights that they aim at.
        candidates: By name.
        options: See `RoundingOptions`.
        seed: Seed of the order of batches and of dropped roundings.
    """
    relaxed: dict[str, RelaxedWeight] = {}
    for layer, fitted, target in layers:
        spec = candidates[fitted.candidate].weight
        if spec is None or fitted.stored is None or layer.use is None:
            continue
        weight = scheme_of(spec).relax(fitted.stored, spec, target)
        if weight is not None:
            relaxed[layer.name] = weight
    wanted = run.exact_outputs(block)
    held = run.held_out or run.fitting
    before = run.loss(block, run.outputs(block, held), [wanted[n] for n in held], held)
    if not relaxed:
        yield Rounded({}, False, before, before, 0, 0)
        return
    chosen = {layer.name: (layer, fitted) for layer, fitted, _ in layers}
    trained = _Trained(
        run, block, {name: (chosen[name][0], relaxed[name]) for name in relaxed}, options
    )
    yield from _train(run, block, trained, wanted, options, seed)
    undecided = trained.undecided
    if undecided > _UNDECIDED * sum(weight.v.numel() for weight in relaxed.values()):
        _log.warning(
            "block %d: %d elements were between two levels when rounding ended; more steps or a"
            " larger regulariser decide them",
            block.number,
            undecided,
        )
    forms: dict[str, LayerFit] = {}
    moved = 0
    for name, weight in relaxed.items():
        layer, old = chosen[name]
        assert old.stored is not None
        stored = weight.stored().measured(layer.weight.tensor.detach())
        moved += weight.moved()
        bias = trained.bias_of(layer)
        forms[name] = replace(
            old,
            stored=stored,
            coded=stored.coded_bits(),
            how="adaptive rounding",
            bias=old.bias if bias is None else bias,
        )
        run.apply(layer, forms[name])
    after = run.loss(block, run.outputs(block, held), [wanted[n] for n in held], held)
    _log.info("block %d: loss %.3g before rounding, %.3g after", block.number, before, after)
    block.changed = True
    if after < before:
        yield Rounded(forms, True, before, after, moved, undecided)
        return
    for layer, fitted, _ in layers:
        run.apply(layer, fitted)
    yield Rounded({}, False, before, after, moved, undecided)


class _Trained:
    """What trains in a block: roundings, scales or tables, biases."""

    def __init__(
        self,
        run: BlockwiseRun,
        block: GraphBlock,
        relaxed: Mapping[str, tuple[GraphLayer, RelaxedWeight]],
        options: RoundingOptions,
    ) -> None:
        self.relaxed = dict(relaxed)
        self.biases: dict[str, nn.Parameter] = {}
        self.undecided = 0
        if options.scales:
            for layer, _ in relaxed.values():
                if layer.bias is not None:
                    now = run.edit.value(layer.bias).detach().float()
                    self.biases[str(layer.bias.target)] = nn.Parameter(now.clone())
        self.forward = _Dropping(block.forward, options.drop)

    def groups(self, options: RoundingOptions) -> list[dict[str, Any]]:
        """Parameters and their learning rates."""
        rate = options.learning_rate
        groups = [{"params": [weight.v for _, weight in self.relaxed.values()], "lr": rate}]
        if options.scales:
            scales = [weight.scales for _, weight in self.relaxed.values()]
            groups.append({"params": scales, "lr": rate * _SCALE_RATE})
            for bias in self.biases.values():
                unit = float(bias.detach().std()) if bias.numel() > 1 else 0.0
                groups.append({"params": [bias], "lr": rate * _BIAS_RATE * max(unit, 1e-2)})
        return groups

    def constants(self) -> dict[fx.Node, Any]:
        """Values of the block's constants."""
        given: dict[str, Tensor] = dict(self.biases)
        for layer, weight in self.relaxed.values():
            dense = weight.dense()
            given |= {str(node.target): dense for node in layer.weight.nodes}
        return self.forward.constants(given)

    def regulariser(self, beta: float) -> Tensor:
        """Mean over the elements of all weights."""
        total = sum(weight.v.numel() for _, weight in self.relaxed.values())
        parts = [
            weight.regulariser(beta) * (weight.v.numel() / total)
            for _, weight in self.relaxed.values()
        ]
        return torch.stack(parts).sum()

    def freeze(self) -> None:
        """Decide every element."""
        self.undecided = sum(weight.undecided() for _, weight in self.relaxed.values())
        for _, weight in self.relaxed.values():
            weight.frozen = True

    def bias_of(self, layer: GraphLayer) -> Tensor | None:
        """The trained bias of a layer in its own type."""
        bias = None if layer.bias is None else self.biases.get(str(layer.bias.target))
        if bias is None or layer.bias_value is None:
            return None
        return bias.detach().to(layer.bias_value.dtype)


class _Dropping:
    """A block whose rounded activations stay unrounded here and there."""

    def __init__(self, forward: BlockForward, drop: float) -> None:
        self.inner, self.drop = forward, drop
        self.generator = torch.Generator()
        gm = forward.run.gm
        self.rounding = {
            node
            for node in forward.block.nodes
            if node.op == "call_module"
            and isinstance(gm.get_submodule(str(node.target)), ActivationQuantizer)
        }

    def constants(self, given: Mapping[str, Tensor]) -> dict[fx.Node, Any]:
        return self.inner.constants(given)

    def __call__(self, constants: Mapping[fx.Node, Any], number: int) -> list[Tensor]:
        return self.inner(constants, number, self.call)

    def call(self, node: fx.Node, value: Value) -> Any:
        rounded = self.inner.run.interpreter.call(node, value)
        source = node.args[0] if node.args else None
        if node not in self.rounding or self.drop == 0 or not isinstance(source, fx.Node):
            return rounded
        kept = torch.rand(rounded.shape, generator=self.generator) < self.drop
        return torch.where(kept, value(source), rounded)


def _train(
    run: BlockwiseRun,
    block: GraphBlock,
    trained: _Trained,
    wanted: Sequence[Sequence[Tensor]],
    options: RoundingOptions,
    seed: int,
) -> Iterator[None]:
    generator = torch.Generator().manual_seed(seed)
    trained.forward.generator.manual_seed(seed + 1)
    weights = {
        number: {
            name: run.curvature.weighting(name, number, options.weighting)
            for name in block.names
            if name
        }
        for number in run.fitting
    }

    def error(constants: dict[fx.Node, Any], number: int) -> Tensor:
        made = trained.forward(constants, number)
        total = torch.zeros(())
        for name, output, goal in zip(block.names, made, wanted[number], strict=True):
            if not name:
                continue
            weight = weights[number][name]
            squares = (output.float() - goal.float()).square()
            total = total + (squares if weight is None else squares * weight).mean()
        return total

    with torch.no_grad():
        # of the weights as they are applied, every element at its level
        constants = block.forward.constants({})
        unit = sum(float(error(constants, number)) for number in run.fitting)
    unit = max(unit / len(run.fitting), 1e-30)
    optimizer = torch.optim.Adam(trained.groups(options))
    settle = round(_SETTLE * options.steps) if options.scales else 0
    total = options.steps + settle
    order: list[int] = []
    for step in range(total):
        order = order or [
            run.fitting[place]
            for place in torch.randperm(len(run.fitting), generator=generator).tolist()
        ]
        if step == options.steps:
            trained.freeze()
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = error(trained.constants(), order.pop()) / unit
            past = (step / options.steps - options.warm_up) / (1 - options.warm_up)
            if 0 <= past < 1:
                first, last = options.beta
                beta = last + (first - last) * (1 + math.cos(math.pi * past)) / 2
                loss = loss + options.regulariser * trained.regulariser(beta)
            loss.backward()
        optimizer.step()
        yield
    if not settle:
        trained.freeze()
