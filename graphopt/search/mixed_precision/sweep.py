"""Sweep: accuracy over realised bits per weight."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.table import Table

from graphopt.errors import InfeasibleError, InputError
from graphopt.files import locked, write_csv
from graphopt.progress import track
from graphopt.report.charts import CurveChart
from graphopt.report.notebook import ShownAsTable
from graphopt.run.content import content_hash
from graphopt.run.record_file import RecordFile
from graphopt.search.mixed_precision.choose import uniform
from graphopt.search.mixed_precision.measurements import Measurements
from graphopt.search.mixed_precision.metrics import shown
from graphopt.search.mixed_precision.options import SweepOptions
from graphopt.search.mixed_precision.plots import chart_of_sweep, plot_sweep
from graphopt.search.mixed_precision.recipe import Recipe
from graphopt.search.mixed_precision.sweep_tasks import UNCOMPRESSED, scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Point", "Sweep", "run_sweep"]

_FORMAT, _VERSION = "graphopt sweep", 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One evaluated model.

    Attributes:
        kind: "recipe", "uniform" or "uncompressed".
        label: Candidate's name, or the solver's.
        target: Bits per weight that were asked for, None for uniform and uncompressed ones.
        bits_per_weight: Realised bits per weight.
        bytes: Bytes of all tensors.
        score: What `evaluate` gave.

    Examples:
        >>> Point("uniform", "4-bit", None, 4.03, 1_200, 0.97)
        Point(kind='uniform', label='4-bit', target=None, bits_per_weight=4.03, bytes=1200, score=0.97)
    """

    kind: str
    label: str
    target: float | None
    bits_per_weight: float
    bytes: int
    score: float


@dataclass(frozen=True)
class Sweep(ShownAsTable):
    """A curve of accuracy over size.

    Attributes:
        points: Recipes by size, then uniform ones, then the uncompressed model.
        recipes: Recipes of the points of kind "recipe", in that order.
        score: Name of the score.
        failed: Targets that no choice meets.

    Examples:
        >>> def score(net):
        ...     return -(net(batches[0]) - model(batches[0])).square().mean().item()
        >>> curve = sensitivities.sweep([4.5, 6.0], evaluate=score)
        >>> isinstance(curve, Sweep), [point.kind for point in curve.points]
        (True, ['recipe', 'recipe', 'uniform', 'uniform', 'uniform', 'uncompressed'])
    """

    points: tuple[Point, ...]
    recipes: tuple[Recipe, ...]
    score: str = "score"
    failed: tuple[float, ...] = ()

    def of_kind(self, kind: str) -> list[Point]:
        """Points of one kind, by size."""
        points = [point for point in self.points if point.kind == kind]
        return sorted(points, key=lambda point: point.bits_per_weight)

    @property
    def knee(self) -> Point:
        """The recipe farthest above the line from the smallest to the largest one.

        Both axes are scaled to the curve's extent (Satopää et al., "Finding a kneedle in a
        haystack", 2011).

        Raises:
            InputError: There is no recipe.
        """
        points = self.of_kind("recipe")
        if not points:
            raise InputError("the sweep has no recipe")
        size = np.array([point.bits_per_weight for point in points])
        score = np.array([point.score for point in points])
        if len(points) < 3 or np.ptp(size) == 0 or np.ptp(score) == 0:
            return points[int(score.argmax())]
        above = (score - score.min()) / np.ptp(score) - (size - size.min()) / np.ptp(size)
        return points[int(above.argmax())]

    def __repr__(self) -> str:
        return f"Sweep({len(self.points)} points of {self.score})"

    def to_rows(self) -> list[dict[str, Any]]:
        """Points as plain values."""
        return [asdict(point) for point in self.points]

    def to_csv(self, path: str | Path) -> Path:
        """Write the points as CSV."""
        return write_csv(Path(path), self.to_rows(), list(Point.__dataclass_fields__))

    def chart(self) -> CurveChart:
        """Accuracy against realised bits per weight as a value, which pages draw."""
        return chart_of_sweep(self)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy against realised bits per weight; see `graphopt.mixed_precision.plots`."""
        return plot_sweep(self, ax)

    def __rich__(self) -> Table:
        table = Table(title=f"{self.score} over bits per weight")
        for heading in ("target", "bits/weight", "bytes", self.score, "what"):
            table.add_column(heading, justify="left" if heading == "what" else "right")
        for point in self.points:
            target = "" if point.target is None else f"{point.target:.2f}"
            label = point.label if point.kind == "recipe" else f"{point.kind} {point.label}"
            knee = " ← knee" if self.recipes and point == self.knee else ""
            table.add_row(
                target,
                f"{point.bits_per_weight:.3f}",
                f"{point.bytes:,}",
                shown(self.score, point.score),
                label + knee,
            )
        return table


def run_sweep(
    table: Measurements,
    targets: Sequence[float],
    evaluate: Callable[[Any], Any],
    apply: Callable[[Recipe], Any],
    recipe_for: Callable[[float], Recipe],
    options: SweepOptions,
) -> Sweep:
    """Apply and evaluate a recipe per target; arguments as for `SensitivityTable.sweep`."""
    failed, planned = [], []
    for asked in map(float, targets):
        try:
            planned.append((asked, recipe_for(asked)))
        except InfeasibleError:
            failed.append(asked)
    if not planned:
        raise InfeasibleError(f"none of the targets {failed} is attainable")
    plain = [
        name
        for name in table.candidates
        if options.uniform and all(name in layer.candidates for layer in table.layers)
    ]
    work: list[tuple[str, float | None, Recipe]] = [
        ("recipe", target, recipe) for target, recipe in planned
    ]
    work += [("uniform", None, uniform(table, name)) for name in plain]
    work.append((UNCOMPRESSED, None, uniform(table, "keep")))
    points: list[Point] = []
    recipes: list[Recipe] = []
    # the table's own way to apply a recipe is part of the library
    own = apply if getattr(apply, "__self__", None) is not table else None
    with contextlib.nullcontext() if options.path is None else locked(Path(options.path)):
        known = _Known(table, options, (evaluate, own))
        missing = known.missing([(kind, recipe) for kind, _, recipe in work])
        measured = (
            scores(table.program, missing, evaluate, own, options.executor) if missing else ()
        )
        fresh = iter(measured)
        for kind, target, recipe in track(work, "sweeping", len(work), enabled=options.progress):
            value = known.get(kind, recipe)
            if value is None:
                value = next(fresh)
                known.add(kind, recipe, value)
            label = next(iter(recipe.distribution)) if kind == "uniform" else recipe.solver
            label = "" if kind == UNCOMPRESSED else label
            points.append(Point(kind, label, target, recipe.bits_per_weight, recipe.bytes, value))
            if kind == "recipe":
                recipes.append(recipe)
    order = sorted(range(len(recipes)), key=lambda place: points[place].bits_per_weight)
    rest = points[len(recipes) :]
    return Sweep(
        tuple([points[place] for place in order] + rest),
        tuple(recipes[place] for place in order),
        options.score,
        tuple(failed),
    )


class _Known:
    """Scores of an earlier, interrupted sweep, in an append-only file.

    A score counts for the function that gave it, on the model that a recipe made by the same means.
    """

    def __init__(
        self, table: Measurements, options: SweepOptions, functions: Sequence[Any]
    ) -> None:
        self._functions = [content_hash(function) for function in functions]
        self._scores: dict[str, float] = {}
        self._file: RecordFile | None = None
        if options.path is None:
            return
        header = table.header
        head = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": header.fingerprint,
            "weights": header.weights,
            "torch": torch.__version__,
        }
        self._file = RecordFile(Path(options.path), head)
        others = 0
        for line in self._file.resume(lambda other: "the model"):
            try:
                if line["functions"] == self._functions:
                    self._scores[str(line["key"])] = float(line["score"])
                else:
                    others += 1
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{options.path}: not a sweep: {error}") from None
        if others:
            _log.warning("%s: %d scores of another function are not used", options.path, others)

    @staticmethod
    def _key(kind: str, recipe: Recipe) -> str:
        chosen = [(layer.name, recipe.choice[layer.name]) for layer in recipe.layers]
        used = {name: spec.to_dict() for name, spec in recipe.candidates.items()}
        specs = [(name, choice, used.get(choice, {})) for name, choice in chosen]
        text = json.dumps([kind, specs], default=str)
        return f"{kind} {hashlib.sha256(text.encode()).hexdigest()[:32]}"

    def missing(self, wanted: Sequence[tuple[str, Recipe]]) -> list[tuple[str, Recipe]]:
        """Those without a score, each once."""
        keys = {self._key(kind, recipe): (kind, recipe) for kind, recipe in reversed(wanted)}
        return [keys[key] for key in reversed(keys) if key not in self._scores]

    def get(self, kind: str, recipe: Recipe) -> float | None:
        return self._scores.get(self._key(kind, recipe))

    def add(self, kind: str, recipe: Recipe, score: float) -> None:
        key = self._key(kind, recipe)
        self._scores[key] = score
        if self._file is not None:
            self._file.append({"key": key, "score": score, "functions": self._functions})
