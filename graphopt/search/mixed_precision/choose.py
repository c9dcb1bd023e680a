"""From a sensitivity table to a recipe: targets, pins and solvers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from typing_extensions import Unpack

from graphopt.config.selection import closest
from graphopt.errors import ConfigError, InfeasibleError, InputError
from graphopt.search.mixed_precision.candidates import KEEP
from graphopt.search.mixed_precision.layers import matches
from graphopt.search.mixed_precision.measurements import Measurements
from graphopt.search.mixed_precision.options import RecipeKeywords, RecipeOptions, Solver
from graphopt.search.mixed_precision.recipe import Recipe
from graphopt.search.mixed_precision.solvers import (
    Problem,
    front,
    solve_exactly,
    solve_greedily,
    solve_on_hull,
)

__all__ = [
    "LayerChoices",
    "Solver",
    "choices_of",
    "choose",
    "every_recipe",
    "make_recipe",
    "uniform",
]


@dataclass(frozen=True)
class LayerChoices:
    """What each layer may become, after pins.

    Attributes:
        names: Candidates of each layer.
        problem: Their losses and sizes.
        pinned: Whether a pin decides for the layer.
    """

    names: tuple[tuple[str, ...], ...]
    problem: Problem
    pinned: tuple[bool, ...]

    def named(self, choice: Sequence[int]) -> list[str]:
        """Names of chosen candidates."""
        return [names[place] for names, place in zip(self.names, choice, strict=True)]


def choices_of(
    table: Measurements, pin: Mapping[str, str] | None = None, *, keep: bool = True
) -> LayerChoices:
    """Losses and sizes of what every layer may become.

    Args:
        table: Measurements.
        pin: Regular expression over layer names → the candidate (or "keep") that they must have.
        keep: Every layer may stay uncompressed, too.

    Raises:
        ConfigError: A pattern matches nothing, or a layer does not have the candidate.
    """
    losses, names, sizes, pinned = [], [], [], []
    matched: set[str] = set()
    for layer, own in zip(table.layers, table.losses(), strict=True):
        rows = [
            (name, loss, float(bits))
            for name, loss, bits in zip(layer.candidates, own, layer.bits, strict=True)
        ]
        kept = (KEEP.name, 0.0, float(layer.kept_bits))
        if keep and KEEP.name not in layer.candidates:
            rows.append(kept)
        for pattern, wanted in (pin or {}).items():
            if not matches(pattern, layer.name):
                continue
            matched.add(pattern)
            if wanted == KEEP.name and wanted not in layer.candidates:
                rows = [kept]
                continue
            rows = [row for row in rows if row[0] == wanted]
            if not rows:
                raise ConfigError(
                    f"pin[{pattern!r}]: {layer.name} has no candidate {wanted!r}; it has"
                    f" {[*layer.candidates, KEEP.name]}"
                )
        pinned.append(any(matches(pattern, layer.name) for pattern in pin or {}))
        names.append(tuple(row[0] for row in rows))
        losses.append([row[1] for row in rows])
        sizes.append([row[2] for row in rows])
    for pattern in pin or {}:
        if pattern not in matched:
            near = closest(pattern, [layer.name for layer in table.layers])
            raise ConfigError(
                f"pin[{pattern!r}] matches no layer"
                + (f"; closest: {', '.join(near)}" if near else "")
            )
    return LayerChoices(tuple(names), Problem.of(losses, sizes), tuple(pinned))


def choose(table: Measurements, **options: Unpack[RecipeKeywords]) -> Recipe:
    """The recipe for one target; options as for `SensitivityTable.recipe`, without `max_drop`."""
    asked = RecipeOptions.of("choose", options)
    targets = (asked.target_bpw, asked.target_bytes, asked.max_loss)
    if sum(target is not None for target in targets) != 1:
        raise InputError("give one of target_bpw, target_bytes, max_loss and max_drop")
    solver = asked.solver
    if solver not in get_args(Solver):
        raise InputError(f"solver must be 'milp', 'lagrangian' or 'greedy', got {solver!r}")
    choices = choices_of(table, asked.pin, keep=asked.keep and solver != "greedy")
    if asked.max_loss is not None:
        return _smallest(table, choices, asked.max_loss, solver, asked.seconds)
    budget = 0.0
    if asked.target_bpw is not None:
        budget = asked.target_bpw * table.weights
    elif asked.target_bytes is not None:
        budget = 8 * float(asked.target_bytes) - table.header.rest_bits
    _require_attainable(table, choices, budget, greedy=solver == "greedy")
    if solver == "greedy":
        return _greedy(table, choices, budget)
    if solver == "milp":
        best = solve_exactly(choices.problem, budget, seconds=asked.seconds)
    else:
        best = solve_on_hull(choices.problem, budget)
    return make_recipe(table, choices.named(best.choice), solver, bound=best.bound, budget=budget)


def _greedy(table: Measurements, choices: LayerChoices, budget: float) -> Recipe:
    """The published walk over (layer, candidate) pairs, best metric first."""
    losses, sizes = choices.problem.losses, choices.problem.sizes
    # pinned layers take no part in the walk
    scores = [
        [] if fixed else [-float(loss) for loss in own]
        for own, fixed in zip(losses, choices.pinned, strict=True)
    ]
    kept = [
        float(own[0]) if fixed else float(layer.kept_bits)
        for layer, own, fixed in zip(table.layers, sizes, choices.pinned, strict=True)
    ]
    choice = solve_greedily(scores, [list(map(float, own)) for own in sizes], kept, budget)
    names = [
        choices.names[layer][place or 0]
        if place is not None or choices.pinned[layer]
        else KEEP.name
        for layer, place in enumerate(choice)
    ]
    free = [0.0 if not fixed else np.inf for fixed in choices.pinned]
    whole = Problem(
        tuple(np.append(own, loss) for own, loss in zip(losses, free, strict=True)),
        tuple(np.append(own, size) for own, size in zip(sizes, kept, strict=True)),
    )
    bound = solve_on_hull(whole, budget).bound
    return make_recipe(table, names, "greedy", bound=bound, budget=budget)


def _smallest(
    table: Measurements, choices: LayerChoices, most: float, solver: Solver, seconds: float
) -> Recipe:
    """The smallest recipe with at most this predicted loss."""
    if solver == "greedy":
        raise InputError("the greedy walk needs a size target; use 'milp' or 'lagrangian'")
    problem = choices.problem
    usable = tuple(np.isfinite(own) for own in problem.losses)
    best = sum(float(own[ok].min()) for own, ok in zip(problem.losses, usable, strict=True))
    if best > most:
        raise InfeasibleError(
            f"max_loss={most:.4g} is below what the candidates attain, {best:.4g}; the predicted"
            f" losses are those of {table.metric.name!r}"
        )
    turned = Problem(
        tuple(np.where(ok, own, np.inf) for own, ok in zip(problem.sizes, usable, strict=True)),
        tuple(np.where(ok, own, 0.0) for own, ok in zip(problem.losses, usable, strict=True)),
    )
    exact = solver == "milp"
    solution = (
        solve_exactly(turned, most, seconds=seconds) if exact else solve_on_hull(turned, most)
    )
    return make_recipe(table, choices.named(solution.choice), solver)


def _require_attainable(
    table: Measurements, choices: LayerChoices, budget: float, *, greedy: bool
) -> None:
    finite = [
        own[np.isfinite(loss)]
        for own, loss in zip(choices.problem.sizes, choices.problem.losses, strict=True)
    ]
    if any(not len(own) for own in finite):
        raise InfeasibleError("a layer has no candidate with a finite loss")
    low = sum(float(own.min()) for own in finite)
    high = sum(float(own.max()) for own in finite)
    rest = table.header.rest_bits
    if budget < low:
        walk = " (what the greedy walk ends at may be more)" if greedy else ""
        raise InfeasibleError(
            f"no choice of candidates meets the target: {budget / table.weights:.3f} bits per weight"
            f" were asked, {low / table.weights:.3f} to {high / table.weights:.3f} are attainable"
            f" ({(low + rest) / 8:,.0f} to {(high + rest) / 8:,.0f} bytes){walk}; add smaller"
            " candidates or raise the target"
        )


def make_recipe(
    table: Measurements,
    names: Sequence[str],
    solver: str,
    *,
    bound: float | None = None,
    budget: float | None = None,
    measured: float | None = None,
    losses: Sequence[Sequence[float]] | None = None,
) -> Recipe:
    """A recipe from one candidate's name per layer; `losses` are the table's, where at hand."""
    choice = {layer.name: name for layer, name in zip(table.layers, names, strict=True)}
    loss = 0.0
    for layer, own in zip(table.layers, losses or table.losses(), strict=True):
        name = choice[layer.name]
        loss += own[layer.candidates.index(name)] if name in layer.candidates else 0.0
    header = table.header
    return Recipe(
        choice,
        header.candidates,
        table.layers,
        header.rest_bits,
        header.fingerprint,
        table.metric.name,
        loss,
        table.metric.value(loss),
        solver,
        bound,
        budget,
        measured,
        artifact=table.artifact,
    )


def uniform(table: Measurements, candidate: str) -> Recipe:
    """The recipe that gives every layer the same candidate.

    Raises:
        InputError: A layer does not have it.
    """
    without = [layer.name for layer in table.layers if candidate not in layer.candidates]
    if without and candidate != KEEP.name:
        raise InputError(f"{without[0]} has no candidate {candidate!r}")
    return make_recipe(table, [candidate] * len(table.layers), "uniform")


def every_recipe(
    table: Measurements, pin: Mapping[str, str] | None = None, *, keep: bool = True
) -> list[Recipe]:
    """Recipes that are each optimal for their own size, from the smallest to the largest."""
    choices, losses = choices_of(table, pin, keep=keep), table.losses()
    return [
        make_recipe(
            table, choices.named(solution.choice), "lagrangian", bound=solution.loss, losses=losses
        )
        for solution in front(choices.problem)
    ]
