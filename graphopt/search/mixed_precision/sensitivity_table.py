"""SensitivityTable: measurements, and the recipes that come of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.compressors.joint import compress
from graphopt.errors import InputError
from graphopt.ir.captured_module import CapturedModule
from graphopt.search.mixed_precision.accuracy_drop import within_drop
from graphopt.search.mixed_precision.choose import Solver, choose, uniform
from graphopt.search.mixed_precision.measurements import Measurements
from graphopt.search.mixed_precision.plots import plot_table
from graphopt.search.mixed_precision.recipe import Recipe
from graphopt.search.mixed_precision.refinement import refine_recipe
from graphopt.search.mixed_precision.sweep import Sweep, run_sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SensitivityTable"]


class SensitivityTable(Measurements):
    """Measurements of one model; made by `analyze`, read by `SensitivityTable.load`."""

    def recipe(
        self,
        *,
        target_bpw: float | None = None,
        target_bytes: float | None = None,
        max_loss: float | None = None,
        max_drop: float | None = None,
        solver: Solver = "milp",
        pin: Mapping[str, str] | None = None,
        keep: bool = True,
        evaluate: Callable[[Any], Any] | None = None,
        apply: Callable[[Recipe], Any] | None = None,
        seconds: float = 60.0,
    ) -> Recipe:
        """Choose a candidate for every layer.

        Give one of the four targets. "milp" is the multiple-choice knapsack, solved to optimality
        by branch and bound (HiGHS); "lagrangian" walks the lower convex hull, in milliseconds for
        thousands of layers; "greedy" is the published walk: all (layer, candidate) pairs by metric,
        best first, each overriding its layer's choice, until the target is met; layers that it does
        not reach stay uncompressed.

        Args:
            target_bpw: Largest number of bits per weight over all layers, tables included.
            target_bytes: Largest size of all tensors of the program, in bytes, the rest included.
            max_loss: Smallest recipe with at most this predicted loss (`Metric.loss`).
            max_drop: Smallest recipe on the hull whose score certainly falls by at most this, by
                bisection with `evaluate`.
            solver: See above; `max_drop` takes the hull's recipes.
            pin: Regular expression over layer names → the candidate, or "keep", that they must have.
            keep: Every layer may stay uncompressed, whether or not that is among its candidates
                (in the greedy walk the layers that it does not reach always do).
            evaluate: For `max_drop`: module → score, larger is better, or one score per sample, with
                which the drop is judged by paired differences (one-sided, 95 %).
            apply: For `max_drop`: recipe → compressed module; k-means palettes by default.
            seconds: Time limit of "milp".

        Raises:
            InfeasibleError: No choice meets the target; the message has the attainable range.
            InputError: Targets are missing or contradict each other.
            ConfigError: A pin matches nothing.
        """
        if max_drop is None:
            return choose(
                self,
                target_bpw=target_bpw,
                target_bytes=target_bytes,
                max_loss=max_loss,
                solver=solver,
                pin=pin,
                keep=keep,
                seconds=seconds,
            )
        if evaluate is None or any(
            each is not None for each in (target_bpw, target_bytes, max_loss)
        ):
            raise InputError("max_drop needs evaluate=, and no other target")
        return within_drop(self, max_drop, evaluate, apply or self._by_kmeans, pin, keep=keep)

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
        *,
        evaluations: int = 16,
        rounds: int = 2,
        pin: Mapping[str, str] | None = None,
        keep: bool = True,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Recipe:
        """Improve a recipe by what layers do to each other, measuring whole models.

        Cross terms propose exchanges of one and two layers; local models at the best choice so far
        propose more. The result is never worse on `data` than the recipe, and never larger than its
        budget (its own size where it has none).

        Args:
            recipe: Where to begin.
            data: Unlabelled inputs of one call each.
            evaluations: Whole models that may be measured, the recipe's own included.
            rounds: Times that the local model is built anew.
            pin: As for `recipe`.
            keep: As for `recipe`.
            seed: Seed of restarts.
            progress: Show bars; None shows them on a terminal.

        Raises:
            StateError: The table has no model.
            InputError: The recipe is for another model, or there are no data.
        """
        return refine_recipe(
            self,
            recipe,
            data,
            evaluations=evaluations,
            rounds=rounds,
            pin=pin,
            keep=keep,
            seed=seed,
            progress=progress,
        )

    def sweep(
        self,
        targets: Iterable[float],
        evaluate: Callable[[Any], Any],
        *,
        solver: Solver = "milp",
        pin: Mapping[str, str] | None = None,
        keep: bool = True,
        refine_with: Iterable[Any] | None = None,
        apply: Callable[[Recipe], Any] | None = None,
        uniform: bool = True,
        score: str = "score",
        path: str | Path | None = None,
        progress: bool | None = None,
    ) -> Sweep:
        """Apply and evaluate recipes over targets.

        >>> curve = table.sweep(np.linspace(2, 6, 9), evaluate=accuracy)
        >>> curve.plot().figure.savefig("curve.png")

        Args:
            targets: Bits per weight; unattainable ones are listed in `Sweep.failed`.
            evaluate: Module → score, larger is better, or one score per sample.
            solver: As for `recipe`.
            pin: As for `recipe`.
            keep: As for `recipe`.
            refine_with: Data with which each recipe is refined first.
            apply: Recipe → compressed module; k-means palettes by default.
            uniform: Evaluate every candidate for all layers as well.
            score: Name of the score.
            path: File that grows with every evaluation and lets an interrupted sweep go on.
            progress: Show bars; None shows them on a terminal.

        Raises:
            InfeasibleError: No target is attainable.
            StateError: The table has no model.
        """
        data = None if refine_with is None else list(refine_with)

        def recipe_for(target: float) -> Recipe:
            found = self.recipe(target_bpw=target, solver=solver, pin=pin, keep=keep)
            if data is None:
                return found
            return self.refine(found, data, pin=pin, keep=keep, progress=False)

        return run_sweep(
            self,
            list(targets),
            evaluate,
            apply or self._by_kmeans,
            recipe_for,
            uniform_points=uniform,
            score=score,
            path=path,
            progress=progress,
        )

    def apply(
        self,
        recipe: Recipe,
        data: Iterable[Any] | None = None,
        *,
        algorithm: str | None = None,
        **options: Any,
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

    def plot(self, ax: Axes | None = None, *, metric: str | None = None) -> Axes:
        """Each candidate's values over the layers; see `graphopt.mixed_precision.plots`."""
        return plot_table(self, ax, metric=metric)
