"""From a sensitivity table to a recipe: targets, pins and solvers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from graphopt.config.selection import closest
from graphopt.errors import ConfigError, InfeasibleError, InputError
from graphopt.search.mixed_precision.candidates import KEEP
from graphopt.search.mixed_precision.layers import matches
from graphopt.search.mixed_precision.measurements import Measurements
from graphopt.search.mixed_precision.recipe import Recipe
from graphopt.search.mixed_precision.solvers import (
    Problem,
    front,
    solve_exactly,
    solve_greedily,
    solve_on_hull,
)

__all__ = ["Options", "Solver", "choose", "every_recipe", "make_recipe", "options_of", "uniform"]

Solver = Literal["milp", "lagrangian", "greedy"]


@dataclass(frozen=True)
class Options:
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


def options_of(
    table: Measurements, pin: Mapping[str, str] | None = None, *, keep: bool = True
) -> Options:
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
    return Options(tuple(names), Problem.of(losses, sizes), tuple(pinned))


def choose(
    table: Measurements,
    *,
    target_bpw: float | None = None,
    target_bytes: float | None = None,
    max_loss: float | None = None,
    solver: Solver = "milp",
    pin: Mapping[str, str] | None = None,
    keep: bool = True,
    seconds: float = 60.0,
) -> Recipe:
    """The recipe for one target; arguments as for `SensitivityTable.recipe`."""
    given = [each for each in (target_bpw, target_bytes, max_loss) if each is not None]
    if len(given) != 1:
        raise InputError("give one of target_bpw, target_bytes, max_loss and max_drop")
    if solver not in ("milp", "lagrangian", "greedy"):
        raise InputError(f"solver must be 'milp', 'lagrangian' or 'greedy', got {solver!r}")
    options = options_of(table, pin, keep=keep and solver != "greedy")
    if max_loss is not None:
        return _smallest(table, options, max_loss, solver, seconds)
    budget = 0.0
    if target_bpw is not None:
        budget = target_bpw * table.weights
    elif target_bytes is not None:
        budget = 8 * target_bytes - table.header.rest_bits
    _require_attainable(table, options, budget, greedy=solver == "greedy")
    if solver == "greedy":
        return _greedy(table, options, budget)
    if solver == "milp":
        found = solve_exactly(options.problem, budget, seconds=seconds)
    else:
        found = solve_on_hull(options.problem, budget)
    return make_recipe(table, options.named(found.choice), solver, bound=found.bound, budget=budget)


def _greedy(table: Measurements, options: Options, budget: float) -> Recipe:
    """The published walk over (layer, candidate) pairs, best metric first."""
    losses, sizes = options.problem.losses, options.problem.sizes
    # pinned layers take no part in the walk
    scores = [
        [] if fixed else [-float(each) for each in own]
        for own, fixed in zip(losses, options.pinned, strict=True)
    ]
    kept = [
        float(own[0]) if fixed else float(layer.kept_bits)
        for layer, own, fixed in zip(table.layers, sizes, options.pinned, strict=True)
    ]
    found = solve_greedily(scores, [list(map(float, own)) for own in sizes], kept, budget)
    names = [
        options.names[layer][place or 0]
        if place is not None or options.pinned[layer]
        else KEEP.name
        for layer, place in enumerate(found)
    ]
    free = [0.0 if not fixed else np.inf for fixed in options.pinned]
    whole = Problem(
        tuple(np.append(own, each) for own, each in zip(losses, free, strict=True)),
        tuple(np.append(own, each) for own, each in zip(sizes, kept, strict=True)),
    )
    bound = solve_on_hull(whole, budget).bound
    return make_recipe(table, names, "greedy", bound=bound, budget=budget)


def _smallest(
    table: Measurements, options: Options, most: float, solver: Solver, seconds: float
) -> Recipe:
    """The smallest recipe with at most this predicted loss."""
    if solver == "greedy":
        raise InputError("the greedy walk needs a size target; use 'milp' or 'lagrangian'")
    problem = options.problem
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
    found = solve_exactly(turned, most, seconds=seconds) if exact else solve_on_hull(turned, most)
    return make_recipe(table, options.named(found.choice), solver)


def _require_attainable(
    table: Measurements, options: Options, budget: float, *, greedy: bool
) -> None:
    finite = [
        own[np.isfinite(loss)]
        for own, loss in zip(options.problem.sizes, options.problem.losses, strict=True)
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
    options, losses = options_of(table, pin, keep=keep), table.losses()
    return [
        make_recipe(table, options.named(each.choice), "lagrangian", bound=each.loss, losses=losses)
        for each in front(options.problem)
    ]
