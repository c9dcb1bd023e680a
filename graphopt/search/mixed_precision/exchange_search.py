"""Refine a recipe by what layers do to each other, with real evaluations.

The additive prediction ignores that the errors of layers add up coherently or cancel. The quadratic
form of the cross terms does not; it is searched by single and double exchanges. At the best choice
found so far, the gradient of the metric in the weights and the curvature of single exchanges give a
local model that is solved exactly among choices that change few layers. Nothing is accepted that was
not measured on the whole model, and better by more than chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphopt.errors import InputError
from graphopt.run.partial_rerun import PartialRerun, RerunPlan
from graphopt.search.mixed_precision.candidates import KEEP
from graphopt.search.mixed_precision.fast import FAST_METRICS
from graphopt.search.mixed_precision.layers import weights_of
from graphopt.search.mixed_precision.options import RefinementOptions
from graphopt.search.mixed_precision.recipe_evaluation import RecipeEvaluator
from graphopt.search.mixed_precision.solvers import Problem, solve_near

__all__ = ["ExchangeModel", "search_exchanges"]

Floats = npt.NDArray[np.float64]
_SHARES = (0.05, 0.1, 0.2)
_RESTARTS = 6
_PAIRS = 256  # single exchanges that are paired with each other


@dataclass
class ExchangeModel:
    """The quadratic form `½ xᵀQx` over choices, with sizes.

    Attributes:
        matrix: Q, [n, n].
        layer: Layer of each column.
        sizes: Bits of each column.
        budget: Bits of all layers together.
    """

    matrix: Floats
    layer: npt.NDArray[np.int64]
    sizes: Floats
    budget: float

    def value(self, state: npt.NDArray[np.int64]) -> float:
        """½ xᵀQx; `state` has the column that each layer takes."""
        return 0.5 * float(self.matrix[np.ix_(state, state)].sum())

    def singles(self, state: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Change of value and of size when one layer takes another column, for every column."""
        now = state[self.layer]
        q = self.matrix
        pull = q[:, state].sum(1)
        every = np.arange(len(q))
        curved = q[every, every] + q[now, now] - 2 * q[every, now]
        return pull - pull[now] + 0.5 * curved, self.sizes - self.sizes[now]

    def search(self, state: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Exchange one layer, or two, as long as that lowers the value within the budget."""
        state = state.copy()
        for _ in range(10 * len(state)):
            gain, size = self.singles(state)
            room = self.budget - float(self.sizes[state].sum())
            allowed = np.where(size <= room, gain, np.inf)
            best = int(allowed.argmin())
            if allowed[best] < -1e-15 * max(abs(self.value(state)), 1e-300):
                state[self.layer[best]] = best
                continue
            pair = self._pair(state, gain, size, room)
            if pair is None:
                break
            for column in pair:
                state[self.layer[column]] = column
        return state

    def _pair(
        self, state: npt.NDArray[np.int64], gain: Floats, size: Floats, room: float
    ) -> tuple[int, int] | None:
        moves = np.flatnonzero(state[self.layer] != np.arange(len(self.layer)))
        shrink, grow = moves[size[moves] < 0], moves[size[moves] >= 0]
        # the cheapest ways down and the most rewarding ways up
        shrink = shrink[np.argsort(gain[shrink] / -size[shrink], kind="stable")[:_PAIRS]]
        grow = grow[np.argsort(gain[grow], kind="stable")[:_PAIRS]]
        if not len(shrink) or not len(grow):
            return None
        a, b = shrink[:, None], grow[None, :]
        now_a, now_b = state[self.layer[a]], state[self.layer[b]]
        q = self.matrix
        cross = q[a, b] - q[a, now_b] - q[now_a, b] + q[now_a, now_b]
        total = gain[a] + gain[b] + cross
        fits = (size[a] + size[b] <= room) & (self.layer[a] != self.layer[b])
        total = np.where(fits, total, np.inf)
        place = int(total.argmin())
        best = total.flat[place]
        if not best < -1e-12 * max(abs(self.value(state)), 1e-300):
            return None
        return int(shrink[place // len(grow)]), int(grow[place % len(grow)])

    def perturbed(
        self, state: npt.NDArray[np.int64], share: float, generator: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """A state within the budget with some layers drawn anew."""
        state = state.copy()
        count = max(1, round(share * len(state)))
        for layer in generator.permutation(len(state))[:count]:
            columns = np.flatnonzero(self.layer == layer)
            state[layer] = generator.choice(columns)
        while self.sizes[state].sum() > self.budget:
            _, size = self.singles(state)
            smaller = np.flatnonzero(size < 0)
            if not len(smaller):
                break
            column = int(generator.choice(smaller))
            state[self.layer[column]] = column
        return state


def search_exchanges(
    evaluator: RecipeEvaluator,
    matrix: Floats,
    starts: Sequence[Sequence[str]],
    budget: float,
    fixed: Sequence[Sequence[str]],
    options: RefinementOptions,
) -> list[str]:
    """A choice at least as good as each of `starts` on the whole model.

    Args:
        evaluator: Measures choices.
        matrix: Cross terms of all candidates of all layers in order.
        starts: Choices to begin with, the candidate of each layer; the first one comes first.
        budget: Bits of all layers together.
        fixed: Candidates that each layer may have.
        options: How many choices may be measured, the first one included; rounds; seed.

    Returns:
        Candidate of each layer.
    """
    layers = evaluator.bench.layers
    known = {
        pair: number
        for number, pair in enumerate(
            (place, name) for place, layer in enumerate(layers) for name in layer.candidates
        )
    }
    kept = [(place, name) for place, names in enumerate(fixed) for name in names]
    where = {pair: number for number, pair in enumerate(kept)}
    if any((place, name) not in where for place, name in enumerate(starts[0])):
        raise InputError(
            "the recipe has a candidate that its layer may not have; see pin= and keep="
        )
    # a layer that stays uncompressed has a row of zeros
    matrix = np.pad(matrix, (0, 1))
    rows = [known.get(pair, len(known)) for pair in kept]
    sizes = np.array([float(layers[place].bits_of(name)) for place, name in kept])
    owners = np.array([place for place, _ in kept])
    exchange = ExchangeModel(matrix[np.ix_(rows, rows)], owners, sizes, budget)
    states = [
        np.array([where[pair] for pair in enumerate(start)])
        for start in starts
        if all(pair in where for pair in enumerate(start))
    ]
    evaluations = options.evaluations
    limit = evaluator.count + evaluations

    def names(own: npt.NDArray[np.int64]) -> list[str]:
        return [kept[column][1] for column in own]

    best = states[0]
    for own in states[:evaluations]:
        if evaluator.is_better(names(own), names(best)):
            best = own
    generator = np.random.default_rng(options.seed)
    seeds = [*states, *(exchange.perturbed(best, 0.2, generator) for _ in range(_RESTARTS))]
    optima = {tuple(own): exchange.value(own) for own in map(exchange.search, seeds)}
    share = max(1, (evaluations - len(states)) // 2)
    for optimum, _ in sorted(optima.items(), key=lambda pair: pair[1])[:share]:
        if evaluator.count >= limit:
            break
        own = np.array(optimum)
        if evaluator.is_better(names(own), names(best)):
            best = own
    for _ in range(options.rounds):
        if evaluator.count >= limit or evaluator.bench.metrics[0].name not in FAST_METRICS:
            break
        before = best
        local = _local(evaluator, exchange, before, kept)
        for part in _SHARES:
            if evaluator.count >= limit:
                break
            changes = max(1, round(part * len(before)))
            near = solve_near(local, budget, _places(exchange, before), changes)
            if near is None:
                continue
            own = _columns(exchange, near.choice)
            if evaluator.is_better(names(own), names(best)):
                best = own
        if best is before:
            break
    return names(best)


def _places(exchange: ExchangeModel, state: npt.NDArray[np.int64]) -> list[int]:
    """Columns as places among the candidates of their layer."""
    first = np.searchsorted(exchange.layer, np.arange(len(state)))
    return [int(place) for place in state - first]


def _columns(exchange: ExchangeModel, choice: Sequence[int]) -> npt.NDArray[np.int64]:
    first = np.searchsorted(exchange.layer, np.arange(len(choice)))
    return first + np.array(choice)


def _local(
    evaluator: RecipeEvaluator,
    exchange: ExchangeModel,
    state: npt.NDArray[np.int64],
    kept: Sequence[tuple[int, str]],
) -> Problem:
    """Change of loss by each exchange alone: slope along its change of weights, and curvature."""
    slopes = _slopes(evaluator, [kept[column][1] for column in state])
    q = exchange.matrix
    every = np.arange(len(q))
    now = state[exchange.layer]
    change = 0.5 * (q[every, every] + q[now, now] - 2 * q[every, now])
    for column, (place, name) in enumerate(kept):
        change[column] += slopes[place].get(name, 0.0)
    losses, sizes = [], []
    for place in range(len(state)):
        own = exchange.layer == place
        losses.append([float(loss) for loss in change[own]])
        sizes.append([float(size) for size in exchange.sizes[own]])
    return Problem.of(losses, sizes)


def _slopes(evaluator: RecipeEvaluator, names: Sequence[str]) -> list[dict[str, float]]:
    """⟨gradient of the loss, Ŵ_c − Ŵ⟩ for every candidate c of every layer."""
    gm = evaluator.compressed(names)
    plan = RerunPlan(gm)
    weights = {weight.name: weight for weight in weights_of(gm)}
    layers = evaluator.bench.layers
    leaves: dict[str, Tensor] = {
        layer.name: weights[layer.name].tensor.detach().clone().requires_grad_() for layer in layers
    }
    sources = {node: leaves[layer.name] for layer in layers for node in weights[layer.name].nodes}
    below = plan.downstream(list(sources))
    before = evaluator.hooks(plan, names)
    total: dict[str, Tensor] = {}
    metric = evaluator.bench.metrics[0].name
    for batch, reference in zip(evaluator.batches, evaluator.reference, strict=True):
        with torch.enable_grad():
            run = PartialRerun(plan, batch)
            outputs = run.traced_outputs(below, sources, before=before)
            loss = _differentiable(metric, outputs, reference) / len(evaluator.batches)
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, grad in zip(leaves, grads, strict=True):
            if grad is not None:
                total[name] = total[name] + grad if name in total else grad
    slopes = []
    exact = {weight.name: weight for weight in weights_of(evaluator.program.graph_module)}
    for layer in layers:
        gradient = total.get(layer.name)
        own: dict[str, float] = {}
        if gradient is not None:
            current = leaves[layer.name].detach()
            for name in (*layer.candidates, KEEP.name):
                dense = evaluator.dense(layer, name)
                other = exact[layer.name].tensor.detach() if dense is None else dense
                own[name] = float((gradient * (other - current)).sum(dtype=torch.float64))
        slopes.append(own)
    return slopes


def _differentiable(metric: str, outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    pairs = [
        (got, want)
        for got, want in zip(outputs, reference, strict=True)
        if want.is_floating_point()
    ]
    total = pairs[0][0].new_zeros(())
    for got, want in pairs:
        if metric == "kl":
            wanted = want.float().log_softmax(-1)
            gap = wanted - got.float().log_softmax(-1)
            total = total + (wanted.exp() * gap).sum(-1).mean()
        elif metric == "cosine":
            total = total + (1 - torch.cosine_similarity(got, want, dim=-1)).mean()
        else:
            error = (got - want).float().square().mean()
            peak = want.float().square().max() if metric == "psnr" else 1.0
            total = total + error / peak
    return total / len(pairs)
