"""Refine a recipe of a table: gather what the search needs, and make a recipe of its outcome."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from graphopt.errors import InfeasibleError, InputError
from graphopt.run.calibration_data import data_list, read_calls
from graphopt.search.mixed_precision.choose import choices_of, choose, make_recipe
from graphopt.search.mixed_precision.cross_terms import Matrix, cross_terms
from graphopt.search.mixed_precision.exact import make_bench
from graphopt.search.mixed_precision.exchange_search import search_exchanges
from graphopt.search.mixed_precision.fast import FAST_METRICS, draw_vectors
from graphopt.search.mixed_precision.measurements import Measurements
from graphopt.search.mixed_precision.options import RefinementOptions, Solver
from graphopt.search.mixed_precision.recipe import Recipe
from graphopt.search.mixed_precision.recipe_evaluation import RecipeEvaluator

__all__ = ["recipe_evaluator", "refine_recipe"]


def recipe_evaluator(
    table: Measurements, data: Iterable[Any], *, progress: bool | None = None
) -> RecipeEvaluator:
    """Something that measures whole recipes of a table on data.

    Raises:
        StateError: The table has no model.
        InputError: There are no data.
    """
    program = table.program
    batches = list(read_calls(program.graph_module, data_list(data) or ()))
    # whole models are corrected as a whole: no moments of single layers are needed
    header = replace(table.header, mode="fast")
    bench = make_bench(program, header, (table.metric,), batches, progress=progress)
    return RecipeEvaluator(program, bench, batches)


def refine_recipe(
    table: Measurements,
    recipe: Recipe,
    data: Iterable[Any],
    options: RefinementOptions,
) -> Recipe:
    """The refined recipe; arguments as for `SensitivityTable.refine`."""
    recipe.check(table.program)
    if options.evaluations < 1:
        raise InputError(f"evaluations must be at least 1, got {options.evaluations}")
    evaluator = recipe_evaluator(table, data, progress=options.progress)
    starts = [[recipe.choice[layer.name] for layer in table.layers]]
    allowed = choices_of(table, options.pin, keep=options.keep).names
    budget = recipe.bits if recipe.budget is None else max(recipe.budget, recipe.bits)
    solvers: tuple[Solver, ...] = ("greedy", "lagrangian")
    for solver in solvers:
        with suppress(InfeasibleError):
            other = choose(
                table,
                target_bpw=budget / table.weights,
                solver=solver,
                pin=options.pin,
                keep=options.keep,
            )
            starts.append([other.choice[layer.name] for layer in table.layers])
    names = search_exchanges(evaluator, _matrix(table, evaluator), starts, budget, allowed, options)
    made = make_recipe(
        table,
        names,
        f"{recipe.solver}, refined",
        budget=recipe.budget,
        measured=evaluator.measure(names),
    )
    return replace(made, loss=table.predict(made.choice)) if table.has_interactions else made


def _matrix(table: Measurements, evaluator: RecipeEvaluator) -> Matrix:
    """Cross terms: the table's, or measured losses with correlations drawn here."""
    if table.has_interactions:
        return table.interactions()
    losses = [loss for layer in table.losses() for loss in layer]
    if table.metric.name not in FAST_METRICS:
        return np.diag(2 * np.clip(np.nan_to_num(losses, posinf=1e300), 0, None))
    drawn = [
        draw_vectors(evaluator.bench, batch, draws=1, seed=seed)
        for seed, batch in enumerate(evaluator.batches)
    ]
    return cross_terms(np.concatenate(drawn).astype(np.float64), table.owners(), losses)
