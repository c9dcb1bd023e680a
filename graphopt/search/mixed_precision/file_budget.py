"""Recipes for a size of the saved file: the program's own bytes are measured and taken off."""

from __future__ import annotations

import inspect
import logging
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from graphopt.backends.lowering import lower
from graphopt.compressors.joint import compress
from graphopt.errors import InfeasibleError, InputError
from graphopt.ir.program import Program
from graphopt.schemes.registry import scheme_of
from graphopt.search.mixed_precision.artifacts import artifact_for
from graphopt.search.mixed_precision.candidates import KEEP, Candidate
from graphopt.search.mixed_precision.choose import choose
from graphopt.search.mixed_precision.configs import config_for
from graphopt.search.mixed_precision.layers import (
    floats_of,
    priced,
    refuse_unsupported,
    rest_bits,
)
from graphopt.search.mixed_precision.options import RecipeOptions
from graphopt.search.mixed_precision.recipe import Recipe
from graphopt.search.mixed_precision.sizes import SizeModel
from graphopt.specs.artifact import ArtifactSpec

if TYPE_CHECKING:
    from graphopt.search.mixed_precision.measurements import Measurements
__all__ = ["file_size", "priced_as", "priced_for", "recipe_for_file"]

_log = logging.getLogger(__name__)
_TRIES = 4
_CLOSE = 0.98  # of the budget; no wider recipe is looked for above
_ANY = sys.float_info.max
# bytes by which files of one recipe differ, as some hold numbers in as few digits as they need
_SLACK = 64
TableT = TypeVar("TableT", bound="Measurements")


def priced_as(table: TableT, asked: RecipeOptions) -> TableT:
    """A table with the sizes of the file that a recipe is asked for; itself, where they are those.

    Args:
        table: Measurements.
        asked: `backend`, `precision` and `lowering` count.

    Raises:
        InputError: Options without a target, or two precisions.
        LoweringError: There is no such target or option, or the target cannot hold a candidate.
        StateError: Sizes are to be counted anew, and the table has no model.
    """
    known = table.artifact
    backend = asked.backend if asked.backend is not None or known is None else known.backend
    wanted = artifact_for(backend, asked.precision, asked.lowering)
    if wanted is None:
        return table
    if known is not None and known.backend == wanted.backend:
        wanted = artifact_for(backend, lowering={**known.lowering, **wanted.lowering}) or wanted
    return priced_for(table, wanted)


def priced_for(table: TableT, artifact: ArtifactSpec) -> TableT:
    """A table with the sizes of a file; itself, where they are those.

    Raises:
        LoweringError: The target cannot hold a candidate.
        StateError: Sizes are to be counted anew, and the table has no model.
    """
    known = table.artifact
    if known is not None and _file(known) == _file(artifact):
        return table
    header, program = table.header, table.program
    refuse_unsupported(tuple(header.candidates.values()), artifact.backend)
    lut, lowering = header.sizes["lut_dtype"], dict(artifact.lowering)
    sizes = SizeModel.of(artifact.backend, None, lut, lowering, floats_of(program))
    layers = priced(program.graph_module, header.layers, header.candidates, sizes)
    rest = rest_bits(program, layers, sizes)
    return table.with_header(
        replace(header, layers=layers, sizes=sizes.to_dict(), lowering=lowering, rest_bits=rest)
    )


def _file(artifact: ArtifactSpec) -> tuple[str, dict[str, Any]]:
    return artifact.backend, dict(artifact.lowering)


def recipe_for_file(table: Measurements, asked: RecipeOptions) -> Recipe:
    """The recipe with the least loss whose artifact fits.

    Tensors are what the size model counts; what the target's file has besides (the program, names,
    headers) is learnt from the file of the recipe that would fit without it, and taken off.

    Args:
        table: Measurements with their program.
        asked: With `target_bytes`, and `backend`, `precision` and `lowering` where the table is for
            another file.

    Raises:
        InfeasibleError: No recipe's file is that small; with the smallest that was found.
        InputError: There is no target, or the table has no model to measure with.
    """
    if not table.has_program:
        raise InputError(
            f"target_bytes is the size of the file for {asked.backend or table.header.sizes['backend']},"
            " which takes the model to measure: load the table with model=; target_bpw needs none"
        )
    table = priced_as(table, asked)
    if table.artifact is None:
        raise InputError("target_bytes of a file needs a target: give backend")
    return _Search(table, asked).recipe()


class _Search:
    """Recipes and the sizes of their files, for one budget.

    Args:
        table: Measurements for the target.
        asked: What is asked for.
    """

    def __init__(self, table: Measurements, asked: RecipeOptions) -> None:
        self.table = table
        self.target = int(float(asked.target_bytes or 0))
        self.solver = asked.solver
        self.given = {name: getattr(asked, name) for name in ("pin", "keep", "seconds")}
        self.sizes: dict[tuple[str, ...], int] = {}
        self.fitting: Recipe | None = None

    def recipe(self) -> Recipe:
        """The best that was found."""
        own = 0.0
        for _ in range(_TRIES):
            recipe = self.chosen(own)
            if recipe is not None and self.is_known(recipe) and self.fitting is None:
                own += (1 - _CLOSE) * self.target  # it is a few bytes too large
                recipe = self.chosen(own)
            if recipe is None or self.is_known(recipe):
                break
            size = self.size(recipe)
            if size >= _CLOSE * self.target and self.fitting is not None:
                break
            # what the file has beside these tensors is taken off next time
            own = float(size + _SLACK - recipe.bytes)
        if self.fitting is None:
            smallest = choose(self.table, max_loss=_ANY, solver="lagrangian", **self.given)
            size = self.size(smallest)
        if self.fitting is None:
            raise InfeasibleError(
                f"no recipe gives a file of {self.target:,} bytes: the smallest, which has"
                f" {smallest.bytes:,} bytes of tensors, takes {size + _SLACK:,}, the nearest budget that fits;"
                " add smaller candidates or raise the budget"
            )
        return self.fitting

    def chosen(self, own: float) -> Recipe | None:
        """The recipe whose tensors leave room for `own` bytes, where there is one."""
        try:
            return choose(
                self.table, target_bytes=self.target - own, solver=self.solver, **self.given
            )
        except InfeasibleError:
            return None

    def is_known(self, recipe: Recipe) -> bool:
        """Whether its file was measured."""
        return _key(recipe) in self.sizes

    def size(self, recipe: Recipe) -> int:
        """Bytes of its file; a recipe that fits is kept where it is the best so far."""
        size = self.sizes[_key(recipe)] = file_size(self.table, recipe, None)
        _log.info("a recipe of %d bytes of tensors has a file of %d", recipe.bytes, size)
        best = self.fitting is None or recipe.loss <= self.fitting.loss
        if size + _SLACK <= self.target and best and self.table.artifact is not None:
            wanted = self.table.artifact.model_copy(update={"max_bytes": self.target})
            self.fitting = replace(recipe, file_bytes=size, artifact=wanted)
        return size


def _key(recipe: Recipe) -> tuple[str, ...]:
    return tuple(recipe.choice[layer.name] for layer in recipe.layers)


def file_size(table: Measurements, recipe: Recipe, lowering: Mapping[str, Any] | None) -> int:
    """Bytes of the artifact of a recipe on the table's target.

    The program's own example stands for calibration data, so that what corrections add counts;
    which ranges and tables come of it has no bearing on sizes, so weights are not fitted to it.

    Args:
        table: Measurements with their program.
        recipe: A recipe of it.
        lowering: Options that take the place of the table's.
    """
    artifact = table.artifact
    assert artifact is not None
    options = {**artifact.lowering, **(lowering or {})}
    chosen = {
        layer.name: _unfitted(table.candidates.get(recipe.choice[layer.name], KEEP))
        for layer in table.layers
    }
    config = config_for(chosen, {layer.name: layer.nodes for layer in table.layers})
    made = compress(
        table.program,
        None,
        config,
        _example_calls(table.program),
        progress=False,
        on_unobserved="skip",
        backend=artifact.backend,
    )
    with tempfile.TemporaryDirectory() as folder:
        emitted = lower(made, artifact.backend, **options)
        emitted.save(Path(folder) / f"model{emitted.suffix}", verify=False)
        return int(emitted.size)


def _unfitted(candidate: Candidate) -> Candidate:
    """A candidate whose weights take the form that it gives them, from the weights alone."""
    if candidate.weight is None:
        return candidate
    weight = scheme_of(candidate.weight).with_algorithm(candidate.weight, "kmeans")
    return replace(candidate, weight=weight)


def _example_calls(program: Program) -> list[Any] | None:
    """The inputs that a program was captured with, as calibration data."""
    args, kwargs = program.example_args, program.example_kwargs
    if not kwargs:
        return [args] if args else None
    signature = inspect.signature(program.graph_module.forward)
    return [dict(signature.bind(*args, **kwargs).arguments)]
