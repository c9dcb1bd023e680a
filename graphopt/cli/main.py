"""graphopt compress, inspect, verify; analyze, recipe, sweep; rdo.

Exit codes: 0 done; 1 an unexpected failure; 2 wrong usage; 3 the model cannot be captured; 4 the
config is wrong or does not fit the model; 5 a tensor cannot be compressed; 6 the target cannot hold
the program; 7 the output exists; 8 the artifact differs from PyTorch by more than `--max-error`, or
could be checked only in part where that was given; 9 an optional package is missing; 10 no recipe
meets the target.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from graphopt import errors
from graphopt.api import as_program, lower
from graphopt.backends import BACKENDS, load_backend
from graphopt.backends.base import Verification
from graphopt.capture import capture
from graphopt.cli import mixed_precision
from graphopt.cli.common import ERR, OUT, Json, Model, print_json
from graphopt.cli.rdo import rdo
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.inspection import inspect_program
from graphopt.joint import compress as graph_compress
from graphopt.mixed_precision import Recipe
from graphopt.palettization import KMeansPalettizer
from graphopt.program import Program
from graphopt.table import CompressionTable

__all__ = ["app", "run"]

app = typer.Typer(
    help="Compress exported PyTorch programs for edge targets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (errors.CaptureError, 3),
    (errors.ConfigError, 4),
    (errors.CompressionError, 5),
    (errors.LoweringError, 6),
    (errors.ArtifactExistsError, 7),
    (errors.VerificationError, 8),
    (errors.MissingDependencyError, 9),
    (errors.InputError, 3),
    (errors.InfeasibleError, 10),
)
_SUFFIX = {"coreai": ".aimodel", "coreml": ".mlpackage", "executorch": ".pte", "torch": ".pt2"}
BackendName = Literal["coreai", "coreml", "executorch", "torch"]

Limit = Annotated[
    float | None,
    typer.Option(help="Fail (exit code 8) above this max|a−b|/max|b| of the outputs."),
]


@app.command()
def compress(
    model: Model,
    config: Annotated[
        Path, typer.Option(help="YAML or JSON palettization config, or a recipe.", exists=True)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write.")],
    backend: Annotated[
        BackendName | None, typer.Option(help="Target; the output's suffix decides when omitted.")
    ] = None,
    precision: Annotated[
        Literal["float32", "float16"] | None,
        typer.Option(help="Float type of the artifact; the target's own default when omitted."),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Evaluate what was saved and compare.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    lenient: Annotated[
        bool, typer.Option("--lenient", help="Config keys that match nothing only warn.")
    ] = False,
    max_error: Limit = None,
    as_json: Json = False,
) -> None:
    """Compress a program as a config or a recipe says and write it for a target."""
    started = time.perf_counter()
    target = backend or _backend_of(output)
    if output.suffix != _SUFFIX[target]:
        raise errors.LoweringError(f"{output.name} must end in {_SUFFIX[target]} for {target}")
    if output.exists() and not overwrite:
        raise errors.ArtifactExistsError(f"{output} exists; pass --overwrite to replace it")
    program, table = _compressed(model, config, lenient=lenient, target=target, as_json=as_json)
    options: dict[str, Any] = {} if precision is None else {"precision": precision}
    if target in ("torch", "executorch"):
        options = {}
    artifact = lower(program, target, **options)
    artifact.save(output, overwrite=overwrite)
    outcome = artifact.verify() if verify else None
    seconds = time.perf_counter() - started
    if as_json:
        print_json(
            {
                "output": str(output),
                "bytes": artifact.size,
                "bits_per_weight": table.bits_per_weight,
                "seconds": seconds,
                "tensors": table.to_dicts(),
                "verification": None if outcome is None else _plain(outcome),
            }
        )
    else:
        OUT.print(table)
        OUT.print(
            f"{output}: {artifact.size:,} bytes, {table.bits_per_weight:.3f} bits per palettized"
            f" weight, {seconds:.1f} s"
        )
        if outcome is not None:
            OUT.print(_sentence(outcome))
    _check(outcome, max_error)


def _compressed(
    model: Path, config: Path, *, lenient: bool, target: str, as_json: bool
) -> tuple[Program, CompressionTable]:
    """The compressed program and the table of what was done, as the target stores it."""
    if mixed_precision.is_recipe(config):
        recipe = Recipe.load(config)
        program = as_program(model)
        recipe.check(program)
        done = graph_compress(program, None, recipe.to_config(), backend=target)
        return done, done.report()
    read = (
        KMeansPalettizerConfig.from_json
        if config.suffix == ".json"
        else KMeansPalettizerConfig.from_yaml
    )
    palettizer = KMeansPalettizer(capture(model), read(config))
    palettizer.prepare(
        on_unmatched="warn" if lenient else "error", progress=False if as_json else None
    )
    return palettizer.program(), palettizer.summary(target)


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """Show modules, ops and sizes by the names that configs use."""
    report = inspect_program(as_program(model))
    if as_json:
        print_json(report.to_dict())
        return
    OUT.print(report.tree())
    OUT.print(report.table())
    if report.static_dims:
        OUT.print(f"fixed input dimensions: {', '.join(report.static_dims)}")


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="What to check.", exists=True)],
    reference: Annotated[Path, typer.Option(help="A .pt2 to compare with.", exists=True)],
    max_error: Limit = None,
    as_json: Json = False,
) -> None:
    """Evaluate a saved artifact on the reference's example inputs and compare."""
    program = as_program(reference)
    if not program.example_args and not program.example_kwargs:
        raise errors.InputError(f"{reference} was saved without example inputs")
    backend = load_backend(_backend_of(artifact))
    outcome = backend.check(artifact, program, program.example_args, program.example_kwargs)
    if as_json:
        print_json({"artifact": str(artifact), **_plain(outcome)})
    else:
        OUT.print(_sentence(outcome))
    _check(outcome, max_error)


app.command()(mixed_precision.analyze)
app.command()(mixed_precision.recipe)
app.command()(mixed_precision.sweep)
app.command()(rdo)


def _backend_of(path: Path) -> BackendName:
    for name, suffix in _SUFFIX.items():
        if path.suffix == suffix:
            return name  # type: ignore[return-value]
    raise errors.LoweringError(
        f"cannot tell the target of {path.name}; suffixes are {sorted(_SUFFIX.values())}"
    )


def _plain(outcome: Verification) -> dict[str, Any]:
    return {
        "max_error": outcome.max_error,
        "outputs": list(outcome.outputs),
        "how": outcome.how,
        "complete": outcome.complete,
        "notes": list(outcome.notes),
        "weights": outcome.weights,
    }


def _sentence(outcome: Verification) -> str:
    notes = "".join(f"; {note}" for note in outcome.notes)
    if not outcome.complete:
        return f"{outcome.how}: {outcome.weights} compressed weights, a partial check{notes}"
    return f"{outcome.how}: outputs differ by {outcome.max_error:.2e} of the largest{notes}"


def _check(outcome: Verification | None, max_error: float | None) -> None:
    if outcome is None or max_error is None:
        return
    if not outcome.complete or not outcome.max_error <= max_error:
        raise errors.VerificationError(f"{_sentence(outcome)}; allowed is {max_error:g}")


def _show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    del place
    if issubclass(category, errors.ConfigWarning):
        ERR.print("[yellow]warning[/yellow]: ", end="")
        ERR.print(str(message), markup=False, highlight=False)


def run() -> None:
    """Entry point: run the command and turn our errors into exit codes."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    warnings.simplefilter("ignore", FutureWarning)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    assert set(_SUFFIX) == {target.value for target in BACKENDS}
    try:
        app()
    except errors.GraphOptError as error:
        ERR.print(f"[red]{type(error).__name__}[/red]: ", end="")
        ERR.print(str(error), markup=False, highlight=False)
        code = next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 1)
        sys.exit(code)
    except KeyboardInterrupt:
        ERR.print("interrupted; nothing was written")
        sys.exit(130)


if __name__ == "__main__":
    run()
