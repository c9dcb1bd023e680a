"""graphopt analyze, recipe, sweep: mixed precision from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.audited import read_arrays, read_tensors
from graphopt.backends.lowering import as_program
from graphopt.cli.common import OUT, Cluster, Json, Model, print_json
from graphopt.cli.options import Fields, Given
from graphopt.cli.target_options import TargetFields
from graphopt.config.base import read_yaml
from graphopt.errors import ArtifactExistsError, InputError
from graphopt.ir.program import Program
from graphopt.run.batches import as_batch
from graphopt.search.mixed_precision.analysis import analyze as run_analysis
from graphopt.search.mixed_precision.candidates import as_candidates, read_candidates
from graphopt.search.mixed_precision.metrics import METRICS, measure
from graphopt.search.mixed_precision.options import (
    AnalysisOptions,
    RecipeOptions,
    RefinementOptions,
    SweepOptions,
)
from graphopt.search.mixed_precision.plots import save_plot
from graphopt.search.mixed_precision.sensitivity_table import SensitivityTable
from graphopt.specs.options import Options

__all__ = ["analyze", "fixed_batch", "is_recipe", "read_data", "recipe", "sweep"]

Data = Annotated[
    Path,
    typer.Option(
        help="Inputs: a .pt file with a tensor or a list of calls, or .npy / .npz with arrays.",
        exists=True,
        dir_okay=False,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        help="Samples of a call, where the file has one array; those that the program takes, or 32.",
        min=1,
    ),
]
TableFile = Annotated[
    Path, typer.Argument(help="What `graphopt analyze` has written.", exists=True, dir_okay=False)
]
Plot = Annotated[Path | None, typer.Option(help="Draw it to this image.")]


@dataclass(frozen=True, kw_only=True)
class Inputs(Options):
    """Data of a command.

    Attributes:
        data: See `Data`.
        batch_size: See `BatchSize`.
    """

    data: Data
    batch_size: BatchSize = None

    def read(self, program: Program) -> list[Any]:
        """Inputs of one call each."""
        return read_data(self.data, self.batch_size, program)


@dataclass(frozen=True, kw_only=True)
class AnalysisFiles(Cluster):
    """Where an analysis is made, and what it writes.

    Attributes:
        output: Table to write, .jsonl.
        plot: See `Plot`.
        csv: Export the rows.
        as_json: See `Json`.
    """

    output: Annotated[Path, typer.Option("--output", "-o")]
    plot: Plot = None
    csv: Path | None = None
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class RecipeFile(Options):
    """Where a recipe goes.

    Attributes:
        output: Recipe to write, .yaml.
        overwrite: Replace the output.
        as_json: See `Json`.
    """

    output: Annotated[Path, typer.Option("--output", "-o")]
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class RefinementFiles(Options):
    """What a recipe is refined on.

    Attributes:
        model: The model of the table, a .pt2 file, for sizes of files.
        refine: Refine on this model, a .pt2 file; needs --data.
        data: Inputs, as for analyze.
        batch_size: See `BatchSize`.
    """

    model: Annotated[Path | None, typer.Option(exists=True, dir_okay=False)] = None
    refine: Path | None = None
    data: Annotated[Path | None, typer.Option(exists=True, dir_okay=False)] = None
    batch_size: BatchSize = None


@dataclass(frozen=True, kw_only=True)
class SweepTargets(Options):
    """What a sweep goes through.

    Attributes:
        first: Smallest target.
        last: Largest target.
        points: Number of targets.
        metric: Distance to the uncompressed outputs: psnr, mse, kl, cosine, top1.
        refine: Refine each recipe first.
    """

    first: Annotated[float, typer.Option("--from")] = 2.0
    last: Annotated[float, typer.Option("--to")] = 6.0
    points: Annotated[int, typer.Option(min=1)] = 9
    metric: str = "psnr"
    refine: Annotated[bool, typer.Option("--refine")] = False


@dataclass(frozen=True, kw_only=True)
class SweepFiles(Cluster):
    """What a sweep writes.

    Attributes:
        output: Scores to write, .jsonl.
        resume: Go on with the output, or begin anew.
        plot: See `Plot`.
        as_json: See `Json`.
    """

    output: Annotated[Path, typer.Option("--output", "-o")]
    resume: Annotated[bool, typer.Option("--resume/--restart")] = True
    plot: Plot = None
    as_json: Json = False


def analyze(
    model: Model,
    inputs: Inputs,
    to: AnalysisFiles,
    how: Annotated[
        Given, Fields(AnalysisOptions, "mode", "backend", "correction", "resume", "seed")
    ],
    form: Annotated[Given, TargetFields()],
    candidates: Annotated[
        str, typer.Option(help="Such as '2,4,6,int8', or a YAML file with 'candidates'.")
    ] = "2,4,6",
    metric: Annotated[
        list[str] | None, typer.Option(help="psnr, mse, kl, cosine, top1; the first decides.")
    ] = None,
) -> None:
    """Measure what each candidate of each layer costs at the outputs."""
    special: Mapping[str, Any] = {}
    if Path(candidates).suffix in (".yaml", ".yml"):
        chosen, special = read_candidates(Path(candidates))
    else:
        chosen = as_candidates([text.strip() for text in candidates.split(",")])
    program = as_program(model)
    with to.workers() as workers:
        table = run_analysis(
            program,
            None,
            chosen,
            inputs.read(program),
            metric or ["psnr"],
            layer_candidates=special,
            path=to.output,
            progress=False if to.as_json else None,
            lowering=form,
            executor=workers,
            **how,
        )
    if to.csv is not None:
        table.to_csv(to.csv)
    if to.plot is not None:
        save_plot(table.plot(), to.plot)
    if to.as_json:
        print_json({"output": str(to.output), "rows": table.to_rows()})
    else:
        OUT.print(table)


def recipe(
    table: TableFile,
    to: RecipeFile,
    asked: Annotated[
        Given,
        Fields(RecipeOptions, "target_bpw", "target_bytes", "max_loss", "backend", "solver", "pin"),
    ],
    on: RefinementFiles,
    how: Annotated[Given, Fields(RefinementOptions, "evaluations")],
    form: Annotated[Given, TargetFields()],
) -> None:
    """Choose a candidate for every layer.

    --bytes is the size of the file, where the table or --backend names a target: files are made to
    measure it, which takes the model (--model).
    """
    if to.output.exists() and not to.overwrite:
        raise ArtifactExistsError(f"{to.output} exists; pass --overwrite to replace it")
    if (on.refine is None) != (on.data is None):
        raise InputError("--refine and --data belong together")
    known = SensitivityTable.load(table, on.model or on.refine)
    chosen = known.recipe(lowering=form, **asked)
    if on.data is not None:
        data = read_data(on.data, on.batch_size, known.program)
        progress = False if to.as_json else None
        chosen = known.refine(chosen, data, pin=asked["pin"], progress=progress, **how)
    chosen.save(to.output, overwrite=to.overwrite)
    if to.as_json:
        print_json({"output": str(to.output), **chosen.to_dict()})
    else:
        OUT.print(chosen)


def sweep(
    table: TableFile,
    model: Model,
    inputs: Inputs,
    to: SweepFiles,
    targets: SweepTargets,
    how: Annotated[Given, Fields(SweepOptions, "solver", "pin")],
) -> None:
    """Compress and evaluate over targets: the curve of accuracy over bits per weight."""
    if targets.metric not in METRICS:
        raise InputError(f"no metric {targets.metric!r}; use one of {sorted(METRICS)}")
    known = SensitivityTable.load(table, model)
    calls = inputs.read(known.program)
    metric = METRICS[targets.metric]
    exact = known.program.module()
    with torch.no_grad():
        wanted = [_called(exact, call) for call in calls]

    if not to.resume:
        to.output.unlink(missing_ok=True)
    with to.workers() as workers:
        curve = known.sweep(
            np.linspace(targets.first, targets.last, targets.points),
            _Score(targets.metric, tuple(calls), tuple(wanted)),
            refine_with=calls if targets.refine else None,
            path=to.output,
            score=targets.metric if metric.larger_is_better else f"-{targets.metric}",
            executor=workers,
            progress=False if to.as_json else None,
            **how,
        )
    if to.plot is not None:
        save_plot(curve.plot(), to.plot)
    if to.as_json:
        print_json({"output": str(to.output), "points": curve.to_rows(), "failed": curve.failed})
    else:
        OUT.print(curve)


@dataclass(frozen=True)
class _Score:
    """A metric's mean over calls; larger is better."""

    metric: str
    calls: tuple[Any, ...]
    wanted: tuple[Any, ...]

    def __call__(self, module: torch.nn.Module) -> float:
        metric = METRICS[self.metric]
        with torch.no_grad():
            outputs = [_called(module, call) for call in self.calls]
        values = [measure(metric, *pair) for pair in zip(outputs, self.wanted, strict=True)]
        mean = sum(values) / len(values)
        return mean if metric.larger_is_better else -mean


def is_recipe(path: Path) -> bool:
    """Whether a YAML file holds a recipe."""
    if path.suffix not in (".yaml", ".yml"):
        return False
    data = read_yaml(path, "config")
    return isinstance(data, dict) and "recipe" in data


def read_data(path: Path, batch_size: int | None, program: Program | None = None) -> list[Any]:
    """Inputs of one call each.

    Args:
        path: A .pt file with a tensor (cut into batches) or a list of calls, a .npy file (cut into
            batches), or a .npz file whose arrays are keyword inputs (cut into batches together).
        batch_size: Samples of a call; None for those that the program takes, or 32.
        program: Whose calls they are, where it is known; where it takes calls of one size only, samples
            that do not fill a call are left out.

    Raises:
        InputError: The file cannot be read, or the program takes calls of another size.
    """
    data: Any = read_arrays(path) if path.suffix in (".npy", ".npz") else read_tensors(path)
    fixed = None if program is None else fixed_batch(program)
    size = batch_size or fixed or 32
    try:
        if isinstance(data, np.ndarray):
            data = torch.from_numpy(data)
        if isinstance(data, Tensor):
            _refuse_other_sizes(size, fixed)
            return _whole(list(data.split(size)), fixed)
        if isinstance(data, Mapping):
            _refuse_other_sizes(size, fixed)
            parts = {name: torch.as_tensor(data[name]).split(size) for name in data}
            calls = zip(*parts.values(), strict=True)
            return _whole([dict(zip(parts, batch, strict=True)) for batch in calls], fixed)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} holds no inputs that can be cut into calls: {error}") from None
    if isinstance(data, list) and data:
        return data
    raise InputError(f"{path}: expected a tensor or a list of calls, got {type(data).__name__}")


def fixed_batch(program: Program) -> int | None:
    """Samples of a call, where a program takes one number of them only."""
    inputs = program.graph_module.graph.find_nodes(op="placeholder")
    values = [node.meta.get("val") for node in inputs]
    sizes = [value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim]
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return None  # an open size is no int
    return sizes[0] if len(set(sizes)) == 1 else None


def _refuse_other_sizes(size: int, fixed: int | None) -> None:
    if fixed is not None and size != fixed:
        raise InputError(
            f"--batch-size {size}: the program takes calls of {fixed}; leave --batch-size out, or"
            " capture the model with an open batch"
        )


def _whole(calls: list[Any], fixed: int | None) -> list[Any]:
    """The calls without a last one that is too small for a program of one size."""
    leaves = pytree.tree_leaves(calls[-1])
    return calls[:-1] if fixed is not None and len(leaves[0]) < fixed and len(calls) > 1 else calls


def _called(module: torch.nn.Module, call: Any) -> list[Tensor]:
    args, kwargs = as_batch(call)
    leaves = pytree.tree_leaves(module(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
