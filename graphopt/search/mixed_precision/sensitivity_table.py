"""SensitivityTable: measurements, and the recipes that come of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from graphopt.compressors.joint import compress
from graphopt.compressors.options import CompressKeywords
from graphopt.errors import InputError
from graphopt.ir.captured_module import CapturedModule
from graphopt.report.charts import DotChart
from graphopt.search.mixed_precision.accuracy_drop import within_drop
from graphopt.search.mixed_precision.choose import choose, uniform
from graphopt.search.mixed_precision.file_budget import (
    file_size,
    priced_as,
    priced_for,
    recipe_for_file,
)
from graphopt.search.mixed_precision.measurements import Measurements
from graphopt.search.mixed_precision.options import (
    RecipeKeywords,
    RecipeOptions,
    RefinementKeywords,
    RefinementOptions,
    SweepKeywords,
    SweepOptions,
)
from graphopt.search.mixed_precision.plots import chart_of_table, plot_table
from graphopt.search.mixed_precision.recipe import Recipe
from graphopt.search.mixed_precision.refinement import refine_recipe
from graphopt.search.mixed_precision.sweep import Sweep, run_sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SensitivityTable"]

_log = logging.getLogger(__name__)


class SensitivityTable(Measurements):
    """Measurements of one model; made by `analyze`, read by `SensitivityTable.load`.

    Examples:
        >>> isinstance(sensitivities, SensitivityTable), list(sensitivities.candidates)
        (True, ['2-bit', '4-bit', '6-bit'])
        >>> sensitivities.uniform("4-bit").choice
        {'0.weight': '4-bit', '2.weight': '4-bit'}
    """

    def recipe(
        self,
        *,
        evaluate: Callable[[Any], Any] | None = None,
        apply: Callable[[Recipe], Any] | None = None,
        **options: Unpack[RecipeKeywords],
    ) -> Recipe:
        """Choose a candidate for every layer.

        Give one of the four targets. "milp" is the multiple-choice knapsack, solved to optimality
        by branch and bound (HiGHS); "lagrangian" walks the lower convex hull, in milliseconds for
        thousands of layers; "greedy" is the published walk: all (layer, candidate) pairs by metric,
        best first, each overriding its layer's choice, until the target is met; layers that it does
        not reach stay uncompressed.

        Args:
            evaluate: For `max_drop`: module → score, larger is better, or one score per sample, with
                which the drop is judged by paired differences (one-sided, 95 %).
            apply: For `max_drop`: recipe → compressed module; k-means palettes by default.
            options: The fields of `RecipeOptions`: a target, `target_bpw` (largest number of bits per
                weight), `target_bytes` (largest size, of the saved artifact where there is a
                backend), `max_loss` (largest predicted loss) or `max_drop` (largest drop of the
                score); `backend`, `precision` and `lowering` (the file that it is for, where that is
                not the table's); `solver` ("milp"), `pin` (regular expression over layer names →
                candidate), `keep` (layers may stay uncompressed; True) and `seconds` (time limit of
                "milp"; 60).

        Raises:
            InfeasibleError: No choice meets the target; the message has the attainable range.
            InputError: Targets are missing or contradict each other, or the table has no model to
                measure a file with.
            LoweringError: The backend has no such option, or cannot hold a candidate.
            ConfigError: A pin matches nothing.
        """
        asked = RecipeOptions.of("recipe", options)
        of_a_file = (asked.backend or self.artifact) is not None
        if asked.target_bytes is not None and of_a_file:
            others = (asked.target_bpw, asked.max_loss, asked.max_drop)
            if any(target is not None for target in others):
                raise InputError("give one of target_bpw, target_bytes, max_loss and max_drop")
            return recipe_for_file(self, asked)
        table = priced_as(self, asked)
        if asked.max_drop is None:
            return choose(table, **options)
        given = (asked.target_bpw, asked.target_bytes, asked.max_loss)
        if evaluate is None or any(target is not None for target in given):
            raise InputError("max_drop needs evaluate=, and no other target")
        by = apply or self._by_kmeans
        return within_drop(table, asked.max_drop, evaluate, by, asked.pin, keep=asked.keep)

    def uniform(self, candidate: str) -> Recipe:
        """The recipe that gives every layer the same candidate; "keep" is the uncompressed model.

        Raises:
            InputError: A layer does not have it.
        """
        return uniform(self, candidate)

    def refine(
        self,
        recipe: Recipe,
        data: Iterable[Any],
        **options: Unpack[RefinementKeywords],
    ) -> Recipe:
        """Improve a recipe by what layers do to each other, measuring whole models.

        Cross terms propose exchanges of one and two layers; local models at the best choice so far
        propose more. The result is never worse on `data` than the recipe, and never larger than its
        budget (its own size where it has none); where the file of what was found misses the
        recipe's budget, the recipe itself is given back.

        Args:
            recipe: Where to begin.
            data: Unlabelled inputs of one call each.
            options: The fields of `RefinementOptions`: `evaluations` (whole models that may be
                measured; 16), `rounds` (times that the local model is built anew; 2), `pin`, `keep`,
                `seed` (of restarts) and `progress`.

        Raises:
            StateError: The table has no model.
            InputError: The recipe is for another model, or there are no data.
        """
        how = RefinementOptions.of("refine", options)
        wanted = recipe.artifact
        table = self if wanted is None else priced_for(self, wanted)
        made = replace(refine_recipe(table, recipe, data, how), artifact=wanted)
        if wanted is None or wanted.max_bytes is None:
            return made
        size = file_size(table, made, None)
        if size > wanted.max_bytes:
            _log.info("the refined recipe's file has %d bytes, more than its budget", size)
            return recipe
        return replace(made, file_bytes=size)

    def sweep(
        self,
        targets: Iterable[float],
        evaluate: Callable[[Any], Any],
        *,
        refine_with: Iterable[Any] | None = None,
        apply: Callable[[Recipe], Any] | None = None,
        **options: Unpack[SweepKeywords],
    ) -> Sweep:
        """Apply and evaluate recipes over targets.

        >>> curve = table.sweep(np.linspace(2, 6, 9), evaluate=accuracy)
        >>> curve.plot().figure.savefig("curve.png")

        Args:
            targets: Bits per weight; unattainable ones are listed in `Sweep.failed`.
            evaluate: Module → score, larger is better, or one score per sample.
            refine_with: Data with which each recipe is refined first.
            apply: Recipe → compressed module; k-means palettes by default.
            options: The fields of `SweepOptions`: `solver`, `pin` and `keep` as for `recipe`,
                `uniform` (evaluate every candidate for all layers as well; True), `score` (its
                name), `path` (file that grows with every evaluation and lets an interrupted sweep go
                on), `executor` (where models are scored) and `progress`.

        Raises:
            InfeasibleError: No target is attainable.
            StateError: The table has no model.
        """
        asked = SweepOptions.of("sweep", options)
        data = None if refine_with is None else list(refine_with)

        def recipe_for(target: float) -> Recipe:
            chosen = choose(
                self, target_bpw=target, solver=asked.solver, pin=asked.pin, keep=asked.keep
            )
            if data is None:
                return chosen
            return self.refine(chosen, data, pin=asked.pin, keep=asked.keep, progress=False)

        by = apply or self._by_kmeans
        return run_sweep(self, list(targets), evaluate, by, recipe_for, asked)

    def apply(
        self,
        recipe: Recipe,
        data: Iterable[Any] | None = None,
        *,
        algorithm: str | None = None,
        **options: Unpack[CompressKeywords],
    ) -> CapturedModule:
        """The table's model compressed by a recipe.

        Args:
            recipe: A recipe of this table.
            data: Calibration inputs of one call each, for corrections and algorithms that need them.
            algorithm: As for `Recipe.to_config`.
            options: Further options of `graphopt.compress`.

        Raises:
            StateError: The table has no model.
            InputError: The recipe is for another model.
        """
        recipe.check(self.program)
        config = recipe.to_config(algorithm=algorithm)
        return compress(self.program, None, config, calibration_data=data, **options).module()

    def _by_kmeans(self, recipe: Recipe) -> CapturedModule:
        return self.apply(recipe, algorithm="kmeans")

    def chart(self, metric: str | None = None) -> DotChart:
        """Each candidate's values over the layers as a value, which pages draw."""
        return chart_of_table(self, metric)

    def plot(self, ax: Axes | None = None, *, metric: str | None = None) -> Axes:
        """Each candidate's values over the layers; see `graphopt.mixed_precision.plots`."""
        return plot_table(self, ax, metric=metric)
