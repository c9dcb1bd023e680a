"""Options of mixed precision: of the analysis, of a recipe, of its refinement, and of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import torch

from graphopt.backends.registry import ExportBackend
from graphopt.errors import InputError
from graphopt.search.mixed_precision.candidates import CandidateLike
from graphopt.specs.artifact import read_bytes
from graphopt.specs.options import Options

__all__ = [
    "AnalysisKeywords",
    "AnalysisOptions",
    "Candidates",
    "Correction",
    "Mode",
    "RecipeKeywords",
    "RecipeOptions",
    "RefinementKeywords",
    "RefinementOptions",
    "Solver",
    "SweepKeywords",
    "SweepOptions",
]

Candidates = Sequence[CandidateLike] | Mapping[str, CandidateLike]
Correction = Literal["statistics", "batch_norm", "bias"]
Mode = Literal["exact", "fast", "hybrid"]
Solver = Literal["milp", "lagrangian", "greedy"]


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions(Options):
    """How sensitivities are measured.

    Attributes:
        mode: Measured, predicted, or both. "exact" gives, for every candidate, the number that
            compressing this layer in a copy of the model and running it all gives, but runs only
            what depends on the layer; "fast" predicts the numbers from one forward and one backward
            pass and gives the cross terms between layers too (`graphopt.mixed_precision.fast`);
            "hybrid" does both: measured numbers, predicted cross terms.
        backend: Target whose sizes and limits count. Candidates that it cannot hold are refused.
        precision: Float type of the artifact, for targets with the option. Their own default when None.
        lowering: Other options with which the artifact will be made. Recipes carry them to `save`.
        layer_candidates: Regular expression over tensor names, module names or module types →
            candidates of those layers; the last that matches counts.
        correction: Measure under this correction. It is the one that will be applied afterwards:
            "batch_norm" (statistics estimated again), "bias" (means corrected), "statistics" (both,
            what `compress` does), or None. A layer's own output is corrected.
        path: File that grows with every measurement; None keeps them in memory.
        resume: Go on with the output, or begin anew.
        executor: Any `concurrent.futures.Executor`, or a Dask client or cluster, over which batches
            are distributed. Workers in other processes get the program as a .pt2 file. Results do
            not depend on it.
        draws: Random directions per sample ("fast", "hybrid"), a backward pass each.
        max_vectors: About as many vectors are drawn at most; more samples are summed in groups.
        weight_threshold: Weights of at most this many elements are left out.
        float_dtype: Type of tables, scales and uncompressed weights that sizes count. None is that of
            the target's artifact, float16 without a target.
        lut_dtype: Type of table entries where it differs.
        seed: Seed of vector tables and directions.
        progress: Show bars; None shows them on a terminal.
    """

    mode: Mode = "exact"
    backend: ExportBackend | str | None = None
    precision: str | None = None
    lowering: Mapping[str, Any] | None = None
    layer_candidates: Mapping[str, Candidates] | None = None
    correction: Correction | None = None
    path: str | Path | None = None
    resume: bool = True
    executor: Any = None
    draws: int = 1
    max_vectors: int = 128
    weight_threshold: int = 0
    float_dtype: torch.dtype | str | None = None
    lut_dtype: torch.dtype | str | None = None
    seed: int = 0
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InputError(f"mode must be 'exact', 'fast' or 'hybrid', got {self.mode!r}")
        if self.correction not in (None, *get_args(Correction)):
            raise InputError(
                "correction must be 'statistics', 'batch_norm', 'bias' or None, got"
                f" {self.correction!r}"
            )


class AnalysisKeywords(TypedDict, total=False):
    """The options of `AnalysisOptions` as keywords of a call."""

    mode: Mode
    backend: ExportBackend | str | None
    precision: str | None
    lowering: Mapping[str, Any] | None
    layer_candidates: Mapping[str, Candidates] | None
    correction: Correction | None
    path: str | Path | None
    resume: bool
    executor: Any
    draws: int
    max_vectors: int
    weight_threshold: int
    float_dtype: torch.dtype | str | None
    lut_dtype: torch.dtype | str | None
    seed: int
    progress: bool | None


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(Options):
    """What a recipe must meet, and how it is found; one of the four targets is given.

    Attributes:
        target_bpw: Largest bits per weight. Over all layers, tables included.
        target_bytes: Largest size. Of the saved artifact, in bytes or as a text such as "1.5 MB"
            (powers of 1000) or "1.5 MiB" (of 1024), where there is a backend: artifacts are made to
            measure it, so the table must have its model. Else of all tensors of the program.
        backend: Target of the artifact. The table's own when None; sizes are counted anew for another.
        precision: Float type of the artifact, for targets with the option. The table's when None.
        lowering: Other options of the target with which the artifact will be made. They take the place
            of the table's, one by one.
        max_loss: Largest predicted loss. The smallest recipe within it is taken (`Metric.loss`).
        max_drop: Smallest recipe on the hull whose score certainly falls by at most this, by
            bisection with `evaluate`.
        solver: How recipes are found. "milp" is the multiple-choice knapsack, solved to optimality
            by branch and bound (HiGHS); "lagrangian" walks the lower convex hull, in milliseconds
            for thousands of layers; "greedy" is the published walk: all (layer, candidate) pairs by
            metric, best first, each overriding its layer's choice, until the target is met; layers
            that it does not reach stay uncompressed. `max_drop` takes the hull's recipes.
        pin: Regular expression over layer names → the candidate, or "keep", that they must have.
        keep: Every layer may stay uncompressed, whether or not that is among its candidates (in the
            greedy walk the layers that it does not reach always do).
        seconds: Time limit of "milp".
    """

    target_bpw: float | None = None
    target_bytes: float | str | None = None
    backend: ExportBackend | str | None = None
    precision: str | None = None
    lowering: Mapping[str, Any] | None = None
    max_loss: float | None = None
    max_drop: float | None = None
    solver: Solver = "milp"
    pin: Mapping[str, str] | None = None
    keep: bool = True
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if isinstance(self.target_bytes, str):
            object.__setattr__(self, "target_bytes", read_bytes(self.target_bytes))


class RecipeKeywords(TypedDict, total=False):
    """The options of `RecipeOptions` as keywords of a call."""

    target_bpw: float | None
    target_bytes: float | str | None
    backend: ExportBackend | str | None
    precision: str | None
    lowering: Mapping[str, Any] | None
    max_loss: float | None
    max_drop: float | None
    solver: Solver
    pin: Mapping[str, str] | None
    keep: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RefinementOptions(Options):
    """How a recipe is refined.

    Attributes:
        evaluations: Models that refinement may measure. The recipe's own is included.
        rounds: Times that the local model is built anew.
        pin: As for a recipe.
        keep: As for a recipe.
        seed: Seed of restarts.
        progress: Show bars; None shows them on a terminal.
    """

    evaluations: int = 16
    rounds: int = 2
    pin: Mapping[str, str] | None = None
    keep: bool = True
    seed: int = 0
    progress: bool | None = None


class RefinementKeywords(TypedDict, total=False):
    """The options of `RefinementOptions` as keywords of a call."""

    evaluations: int
    rounds: int
    pin: Mapping[str, str] | None
    keep: bool
    seed: int
    progress: bool | None


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Options):
    """What a sweep goes through.

    Attributes:
        solver: How recipes are found. As for a recipe.
        pin: As for a recipe.
        keep: As for a recipe.
        uniform: Evaluate every candidate for all layers as well.
        score: Name of the score.
        path: File that grows with every evaluation and lets an interrupted sweep go on.
        executor: Where models are compressed and scored side by side, as for `analyze`. Functions of
            one's own must be importable where workers are other processes. Results do not depend on
            it.
        progress: Show bars; None shows them on a terminal.
    """

    solver: Solver = "milp"
    pin: Mapping[str, str] | None = None
    keep: bool = True
    uniform: bool = True
    score: str = "score"
    path: str | Path | None = None
    executor: Any = None
    progress: bool | None = None


class SweepKeywords(TypedDict, total=False):
    """The options of `SweepOptions` as keywords of a call."""

    solver: Solver
    pin: Mapping[str, str] | None
    keep: bool
    uniform: bool
    score: str
    path: str | Path | None
    executor: Any
    progress: bool | None
