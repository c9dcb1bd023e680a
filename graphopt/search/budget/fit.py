"""fit: the best artifact of a size, in one call."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from typing_extensions import Unpack

from graphopt.backends import load_backend
from graphopt.backends.artifact import Artifact
from graphopt.backends.base import Backend
from graphopt.backends.lowering import as_program, lower
from graphopt.backends.registry import target_of, target_of_suffix
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.compressors.joint import compress
from graphopt.errors import ArtifactExistsError, InfeasibleError, InputError, LoweringError
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.program import Program
from graphopt.progress import step
from graphopt.run.batches import run_call
from graphopt.run.calibration_data import data_list, read_calls
from graphopt.search.budget.offers import offered
from graphopt.search.budget.options import FitKeywords, FitOptions
from graphopt.search.budget.result import Alternative, FitResult, MeasuredError
from graphopt.search.mixed_precision.analysis import analyze
from graphopt.search.mixed_precision.choose import every_recipe
from graphopt.search.mixed_precision.metrics import METRICS, measure
from graphopt.search.mixed_precision.recipe import Recipe
from graphopt.search.mixed_precision.sensitivity_table import SensitivityTable
from graphopt.specs.artifact import read_bytes

__all__ = ["fit"]

_STEP = 1.0  # dB between the choice and the next ones that are named
_TRIES = 4


def fit(
    model: nn.Module | ExportedProgram | Program | str | Path,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    data: Iterable[Any] | None = None,
    *,
    size: str | float,
    path: str | Path,
    example_kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[FitKeywords],
) -> FitResult:
    """Make the best artifact of a model that has at most a size.

    >>> result = fit(model, example, batches, size="64kB", path="model.pt2")
    >>> result.artifact.path.name
    'model.pt2'

    How much each layer suffers from each candidate that the target can hold is measured; the choice of
    least predicted error whose file fits is made with fitted tables and integers, lowered, compared
    with PyTorch and saved. Everything is deterministic.

    Args:
        model: A module, an exported program, a `Program` or a .pt2 file; it is never changed.
        example_inputs: Inputs of one call.
        data: Unlabelled inputs of one call each; a part is held out to measure the error on. None
            takes the program's example, to which nothing is fitted.
        size: Bytes of the saved artifact: a number, or text such as "12MB" or "400 KiB".
        path: Where to save; the suffix names the target.
        example_kwargs: Keyword inputs of the example call.
        options: The fields of `FitOptions`: `backend`, `candidates`, `mode` ("fast", "exact" or
            "hybrid"), `lowering` (options of the target), `held_out` (share of the calls; 0.2),
            `verify`, `overwrite`, `seed` and `progress`.

    Raises:
        InfeasibleError: No choice is that small; the message has the nearest that fits.
        CaptureError: The model cannot be exported.
        InputError: Data do not fit the program, or the size cannot be read.
        LoweringError: The target cannot hold the program.
        ArtifactExistsError: `path` exists and `overwrite` is False.
        VerificationError: The artifact computes something else; nothing is written.
    """
    started = time.perf_counter()
    asked, target_path = read_bytes(size), Path(path)
    how = FitOptions.of("fit", options)
    backend = _backend(target_path, how)
    if target_path.exists() and not how.overwrite:
        raise ArtifactExistsError(f"{target_path} exists; pass overwrite=True to replace it")
    calls = data_list(data)
    program = as_program(model, example_inputs, example_kwargs)
    shown = how.progress
    chosen = _Data.of(program, calls, how.held_out)
    with step("trying what the target holds", enabled=shown):
        candidates = how.candidates or offered(backend)
    table = analyze(
        program,
        None,
        candidates,
        chosen.fitted,
        "psnr",
        mode=how.mode,
        backend=backend.target,
        correction=None if calls is None else "statistics",
        lowering=how.lowering,
        seed=how.seed,
        progress=shown,
    )
    made = _Made.of(table, asked, backend, chosen, how)
    made.artifact.save(target_path, overwrite=how.overwrite, verify=how.verify)
    better, smaller = _neighbours(table, made.recipe, made.size)
    with step("measuring the error", enabled=shown):
        measured = _measured(program, made.program.graph_module, chosen)
    return FitResult(
        made.artifact,
        made.program,
        replace(made.recipe, file_bytes=made.size, measured=measured.psnr),
        asked,
        made.recipe.value,
        measured,
        better,
        smaller,
        time.perf_counter() - started,
    )


def _backend(path: Path, how: FitOptions) -> Backend:
    target = target_of_suffix(path.suffix) if how.backend is None else target_of(how.backend)
    if path.suffix != target.suffix:
        raise LoweringError(f"{path.name} must end in {target.suffix} for {target}")
    return load_backend(target)


@dataclass(frozen=True)
class _Data:
    """Calls to measure and fit on, and others to judge by.

    Attributes:
        fitted: Calls that sensitivities are measured on, and that weights are fitted to.
        judged: Calls that the error is measured on.
        name: What those are, as `MeasuredError.data`.
    """

    fitted: list[Any]
    judged: list[Any]
    name: str

    @classmethod
    def of(cls, program: Program, calls: list[Any] | None, share: float) -> _Data:
        """Every so-many-th call is held out, so that sorted data are in both parts."""
        if calls is None:
            if not program.example_args and not program.example_kwargs:
                raise InputError("give `data`, inputs of one call each; there is no example either")
            batch = _by_name(program)
            return cls([batch], [batch], "example")
        count = min(max(1, round(len(calls) * share)), len(calls) - 1) if share else 0
        if not count:
            return cls(calls, calls, "fitted to")
        held = {int((place + 0.5) * len(calls) / count) for place in range(count)}
        fitted = [call for number, call in enumerate(calls) if number not in held]
        return cls(fitted, [calls[number] for number in sorted(held)], "held out")


def _by_name(program: Program) -> Any:
    """The example as a call: positional inputs, or all by name where some are."""
    if not program.example_kwargs:
        return tuple(program.example_args)
    names = program.graph_module.graph._codegen.pytree_info.orig_args  # type: ignore[attr-defined]
    return {**dict(zip(names, program.example_args, strict=False)), **program.example_kwargs}


@dataclass(frozen=True)
class _Made:
    """A recipe, carried out for a target; the artifact has no place yet."""

    recipe: Recipe
    program: CompressedProgram
    artifact: Artifact
    size: int

    @classmethod
    def of(
        cls, table: SensitivityTable, asked: int, backend: Backend, data: _Data, how: FitOptions
    ) -> _Made:
        """The best choice whose artifact fits, once its weights are fitted.

        Raises:
            InfeasibleError: None does, with the nearest.
        """
        budget = asked
        for _ in range(_TRIES):
            with step("choosing", enabled=how.progress):
                recipe = table.recipe(target_bytes=budget)
            made = cls._carried_out(table.program, recipe, backend, data, how)
            if made.size <= asked:
                return made
            budget -= made.size - asked  # what fitting has added, such as biases
        raise InfeasibleError(
            f"no choice was found whose file has at most {asked:,} bytes once its weights are fitted; the"
            f" nearest has {made.size:,}"
        )

    @classmethod
    def _carried_out(
        cls, program: Program, recipe: Recipe, backend: Backend, data: _Data, how: FitOptions
    ) -> _Made:
        given = None if data.name == "example" else data.fitted
        compressed = compress(
            program,
            None,
            replace(recipe, artifact=None).to_config(),  # the size is looked at here
            given,
            backend=backend.target,
            seed=how.seed,
            progress=how.progress,
        )
        with (
            step(f"lowering to {backend.name}", enabled=how.progress),
            tempfile.TemporaryDirectory() as folder,
        ):
            artifact = lower(compressed, backend.target, **dict(how.lowering or {}))
            artifact.save(Path(folder) / f"model{artifact.suffix}", verify=False)
            return cls(recipe, compressed, artifact, artifact.size)


def _neighbours(
    table: SensitivityTable, recipe: Recipe, size: int
) -> tuple[Alternative | None, Alternative | None]:
    """The smallest choice that is clearly better, and the best one that is clearly worse."""
    own = size - recipe.bytes  # the program, names and headers
    better = smaller = None
    for other in every_recipe(table):
        choice = Alternative(other, other.bytes + own, other.value)
        if other.bytes < recipe.bytes and other.value <= recipe.value - _STEP:
            smaller = choice
        if other.bytes > recipe.bytes and other.value >= recipe.value + _STEP and better is None:
            better = choice
    return better, smaller


@torch.no_grad()
def _measured(program: Program, compressed: CapturedModule, data: _Data) -> MeasuredError:
    """Error of a compressed program on the calls that it is judged by."""
    exact, values = program.graph_module, list[tuple[float, float]]()
    batches = list(read_calls(exact, data.judged))
    for batch in batches:
        want, got = (_tensors(run_call(module, batch)) for module in (exact, compressed))
        values.append((measure(METRICS["psnr"], got, want), measure(METRICS["cosine"], got, want)))
    psnr, cosine = (sum(column) / len(values) for column in zip(*values, strict=True))
    return MeasuredError(psnr, cosine, len(batches), data.name)


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
