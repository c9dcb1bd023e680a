"""graphopt analyze, recipe, sweep: mixed precision from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.backends.registry import ExportBackend
from graphopt.cli.common import OUT, Json, Model, print_json
from graphopt.config.base import read_yaml
from graphopt.errors import ArtifactExistsError, ConfigError, InputError
from graphopt.run.layerwise import as_batch
from graphopt.search.mixed_precision import SensitivityTable
from graphopt.search.mixed_precision import analyze as run_analysis
from graphopt.search.mixed_precision.candidates import as_candidates, read_candidates
from graphopt.search.mixed_precision.metrics import METRICS, measure
from graphopt.search.mixed_precision.plots import save_plot

__all__ = ["analyze", "is_recipe", "read_data", "recipe", "sweep"]

Data = Annotated[
    Path,
    typer.Option(
        help="Inputs: a .pt file with a tensor or a list of calls, or .npy / .npz with arrays.",
        exists=True,
        dir_okay=False,
    ),
]
BatchSize = Annotated[
    int, typer.Option(help="Samples of a call, where the file has one array.", min=1)
]
TableFile = Annotated[
    Path, typer.Argument(help="What `graphopt analyze` has written.", exists=True, dir_okay=False)
]
Pins = Annotated[
    list[str] | None,
    typer.Option("--pin", help="'pattern=candidate' that layers must have; may be repeated."),
]
Solver = Annotated[
    Literal["milp", "lagrangian", "greedy"], typer.Option(help="How recipes are found.")
]
Plot = Annotated[Path | None, typer.Option(help="Draw it to this image.")]


def analyze(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Table to write, .jsonl.")],
    candidates: Annotated[
        str, typer.Option(help="Such as '2,4,6,int8', or a YAML file with 'candidates'.")
    ] = "2,4,6",
    metric: Annotated[
        list[str] | None, typer.Option(help="psnr, mse, kl, cosine, top1; the first decides.")
    ] = None,
    mode: Annotated[
        Literal["exact", "fast", "hybrid"], typer.Option(help="Measured, predicted, or both.")
    ] = "exact",
    backend: Annotated[
        ExportBackend | None,
        typer.Option(help="Target whose sizes and limits count."),
    ] = None,
    correction: Annotated[
        Literal["statistics", "batch_norm", "bias"] | None,
        typer.Option(help="Measure under this correction."),
    ] = None,
    batch_size: BatchSize = 32,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on with the output, or begin anew.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of vector tables and directions.")] = 0,
    plot: Plot = None,
    csv: Annotated[Path | None, typer.Option(help="Export the rows.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what each candidate of each layer costs at the outputs."""
    special: Mapping[str, Any] = {}
    if Path(candidates).suffix in (".yaml", ".yml"):
        chosen, special = read_candidates(Path(candidates))
    else:
        chosen = as_candidates([each.strip() for each in candidates.split(",")])
    table = run_analysis(
        model,
        None,
        chosen,
        read_data(data, batch_size),
        metric or ["psnr"],
        mode=mode,
        backend=backend,
        layer_candidates=special,
        correction=correction,
        path=output,
        resume=resume,
        seed=seed,
        progress=False if as_json else None,
    )
    if csv is not None:
        table.to_csv(csv)
    if plot is not None:
        save_plot(table.plot(), plot)
    if as_json:
        print_json({"output": str(output), "rows": table.to_rows()})
    else:
        OUT.print(table)


def recipe(
    table: TableFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe to write, .yaml.")],
    bpw: Annotated[float | None, typer.Option(help="Largest bits per weight.")] = None,
    size: Annotated[float | None, typer.Option("--bytes", help="Largest size.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="Largest predicted loss.")] = None,
    solver: Solver = "milp",
    pin: Pins = None,
    refine: Annotated[
        Path | None, typer.Option(help="Refine on this model, a .pt2 file; needs --data.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Inputs, as for analyze.", exists=True, dir_okay=False)
    ] = None,
    evaluations: Annotated[int, typer.Option(help="Models that --refine may measure.")] = 16,
    batch_size: BatchSize = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    as_json: Json = False,
) -> None:
    """Choose a candidate for every layer."""
    if output.exists() and not overwrite:
        raise ArtifactExistsError(f"{output} exists; pass --overwrite to replace it")
    if (refine is None) != (data is None):
        raise InputError("--refine and --data belong together")
    known = SensitivityTable.load(table, refine)
    found = known.recipe(
        target_bpw=bpw, target_bytes=size, max_loss=max_loss, solver=solver, pin=_pins(pin)
    )
    if data is not None:
        found = known.refine(
            found,
            read_data(data, batch_size),
            evaluations=evaluations,
            pin=_pins(pin),
            progress=False if as_json else None,
        )
    found.save(output, overwrite=overwrite)
    if as_json:
        print_json({"output": str(output), **found.to_dict()})
    else:
        OUT.print(found)


def sweep(
    table: TableFile,
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Scores to write, .jsonl.")],
    first: Annotated[float, typer.Option("--from", help="Smallest target.")] = 2.0,
    last: Annotated[float, typer.Option("--to", help="Largest target.")] = 6.0,
    points: Annotated[int, typer.Option(help="Number of targets.", min=1)] = 9,
    metric: Annotated[
        str, typer.Option(help="Distance to the uncompressed outputs: psnr, mse, kl, cosine, top1.")
    ] = "psnr",
    solver: Solver = "milp",
    pin: Pins = None,
    refine: Annotated[bool, typer.Option("--refine", help="Refine each recipe first.")] = False,
    batch_size: BatchSize = 32,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on with the output, or begin anew.")
    ] = True,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Compress and evaluate over targets: the curve of accuracy over bits per weight."""
    if metric not in METRICS:
        raise InputError(f"no metric {metric!r}; use one of {sorted(METRICS)}")
    calls = read_data(data, batch_size)
    known = SensitivityTable.load(table, model)
    chosen = METRICS[metric]
    exact = known.program.module()
    with torch.no_grad():
        wanted = [_called(exact, call) for call in calls]

    def score(module: torch.nn.Module) -> float:
        with torch.no_grad():
            found = [_called(module, call) for call in calls]
        values = [measure(chosen, *pair) for pair in zip(found, wanted, strict=True)]
        mean = sum(values) / len(values)
        return mean if chosen.larger_is_better else -mean

    if not resume:
        output.unlink(missing_ok=True)
    curve = known.sweep(
        np.linspace(first, last, points),
        score,
        solver=solver,
        pin=_pins(pin),
        refine_with=calls if refine else None,
        path=output,
        score=metric if chosen.larger_is_better else f"-{metric}",
        progress=False if as_json else None,
    )
    if plot is not None:
        save_plot(curve.plot(), plot)
    if as_json:
        print_json({"output": str(output), "points": curve.to_rows(), "failed": curve.failed})
    else:
        OUT.print(curve)


def is_recipe(path: Path) -> bool:
    """Whether a YAML file holds a recipe."""
    if path.suffix not in (".yaml", ".yml"):
        return False
    data = read_yaml(path, "config")
    return isinstance(data, dict) and "recipe" in data


def read_data(path: Path, batch_size: int) -> list[Any]:
    """Inputs of one call each.

    Args:
        path: A .pt file with a tensor (cut into batches) or a list of calls, a .npy file (cut into
            batches), or a .npz file whose arrays are keyword inputs (cut into batches together).
        batch_size: Samples of a call.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        if path.suffix in (".npy", ".npz"):
            found: Any = np.load(path, allow_pickle=False)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if isinstance(found, np.ndarray):
        found = torch.from_numpy(found)
    if isinstance(found, Tensor):
        return list(found.split(batch_size))
    if isinstance(found, list) and found:
        return found
    if isinstance(found, Mapping):
        parts = {name: torch.as_tensor(found[name]).split(batch_size) for name in found}
        return [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]
    raise InputError(f"{path}: expected a tensor or a list of calls, got {type(found).__name__}")


def _called(module: torch.nn.Module, call: Any) -> list[Tensor]:
    args, kwargs = as_batch(call)
    leaves = pytree.tree_leaves(module(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _pins(given: list[str] | None) -> dict[str, str]:
    found = {}
    for text in given or []:
        pattern, sign, candidate = text.rpartition("=")
        if not sign:
            raise ConfigError(f"--pin {text!r}: write pattern=candidate")
        found[pattern] = candidate
    return found
