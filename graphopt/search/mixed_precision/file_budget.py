"""Recipes for a size of the saved file: the program's own bytes are measured and taken off."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.backends import load_backend
from graphopt.backends.lowering import lower
from graphopt.compressors.joint import compress
from graphopt.errors import InfeasibleError
from graphopt.search.mixed_precision.candidates import KEEP
from graphopt.search.mixed_precision.choose import choose
from graphopt.search.mixed_precision.configs import config_for
from graphopt.search.mixed_precision.options import RecipeOptions
from graphopt.search.mixed_precision.recipe import Recipe

if TYPE_CHECKING:
    from graphopt.search.mixed_precision.measurements import Measurements
__all__ = ["file_size", "recipe_for_file"]

_log = logging.getLogger(__name__)
_TRIES = 4


def recipe_for_file(table: Measurements, asked: RecipeOptions) -> Recipe:
    """The recipe with the least loss whose artifact fits.

    Tensors are what the size model counts; what the target's file has besides (the program, names,
    headers) is learnt from the file of the recipe that would fit without it, and taken off.

    Args:
        table: Measurements for a target, with their program.
        asked: With `target_bytes`, and `lowering`, the options of the target.

    Raises:
        InfeasibleError: No recipe's file is that small; with the smallest that was found.
    """
    target = float(asked.target_bytes or 0)
    own, sizes = 0.0, list[int]()
    given = {name: getattr(asked, name) for name in ("solver", "pin", "keep", "seconds")}
    for _ in range(_TRIES):
        try:
            recipe = choose(table, target_bytes=target - own, **given)
        except InfeasibleError as error:
            if not sizes:
                raise
            raise InfeasibleError(
                f"no recipe gives a file of {target:.0f} bytes: beside its tensors it has {own:.0f};"
                f" the nearest that was tried has {min(sizes)} bytes ({error})"
            ) from None
        size = file_size(table, recipe, asked.lowering)
        sizes.append(size)
        _log.info("a recipe of %d bytes of tensors has a file of %d", recipe.bytes, size)
        if size <= target:
            return _roomier(table, replace(recipe, file_bytes=size), target, given, asked.lowering)
        own += size - target if own else size - recipe.bytes
    raise InfeasibleError(
        f"no recipe was found whose file has at most {target:.0f} bytes; the nearest has {min(sizes)}"
    )


def _roomier(
    table: Measurements,
    fitting: Recipe,
    target: float,
    given: dict[str, Any],
    lowering: Mapping[str, Any] | None,
) -> Recipe:
    """A better recipe than one that fits, where the file takes less than its tensors were counted."""
    assert fitting.file_bytes is not None
    saved = fitting.bytes - fitting.file_bytes
    if saved <= 0:
        return fitting
    wider = choose(table, target_bytes=target + saved, **given)
    if wider.choice == fitting.choice:
        return fitting
    size = file_size(table, wider, lowering)
    return replace(wider, file_bytes=size) if size <= target else fitting


def file_size(table: Measurements, recipe: Recipe, lowering: Mapping[str, Any] | None) -> int:
    """Bytes of the artifact of a recipe on the table's target; activations stay in float."""
    sizes = table.header.sizes
    name = str(sizes["backend"])
    options = dict(lowering or {})
    if any(field.name == "precision" for field in fields(load_backend(name).options)):
        half = sizes["float_dtype"] == "float16"
        options.setdefault("precision", "float16" if half else "float32")
    weights = {
        layer: replace(table.candidates.get(candidate, KEEP), activation=None)
        for layer, candidate in recipe.choice.items()
    }
    config = config_for(weights, {})
    program = compress(table.program, None, config, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        artifact = lower(program, name, **options)
        artifact.save(Path(folder) / f"model{artifact.suffix}", verify=False)
        return artifact.size
