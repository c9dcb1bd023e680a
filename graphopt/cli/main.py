"""graphopt fit; compress, lower, inspect, verify, diff, report; analyze, recipe, sweep; rdo.

Exit codes: 0 done; 1 an unexpected failure; 2 wrong usage; 3 the model cannot be captured; 4 the
config is wrong or does not fit the model; 5 a tensor cannot be compressed, or data for it are
missing; 6 the target cannot hold the program; 7 the output exists; 8 the artifact differs from
PyTorch by more than `--max-error`, or could be checked only in part where that was given; 9 an
optional package is missing; 10 no recipe meets the target.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt import errors
from graphopt.backends import load_backend
from graphopt.backends.lowering import as_program
from graphopt.cli import mixed_precision
from graphopt.cli.artifacts import Limit, backend_of, check_limit, plain, sentence
from graphopt.cli.common import ERR, OUT, Json, Model, print_json, reading
from graphopt.cli.compress import compress, lower_program
from graphopt.cli.fit import fit
from graphopt.cli.options import shell_command
from graphopt.cli.rdo import rdo
from graphopt.cli.reports import compare, report
from graphopt.inspection import inspect_program, save_graph

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
    (errors.CalibrationError, 5),
    (errors.LoweringError, 6),
    (errors.ArtifactExistsError, 7),
    (errors.VerificationError, 8),
    (errors.MissingDependencyError, 9),
    (errors.InputError, 3),
    (errors.InfeasibleError, 10),
)


app.command()(reading(shell_command(fit)))
app.command()(reading(shell_command(compress)))
app.command("lower")(reading(shell_command(lower_program)))


@app.command()
@reading
def inspect(
    model: Model,
    graph: Annotated[
        Path | None, typer.Option(help="Write the graph, too: .svg, .png, .graphml, .gexf, .json.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show modules, ops and sizes by the names that configs use."""
    program = as_program(model)
    if graph is not None:
        save_graph(program, graph)
    inspection = inspect_program(program)
    if as_json:
        print_json(inspection.to_dict())
        return
    OUT.print(inspection.tree())
    OUT.print(inspection.table())
    for state in inspection.state:
        OUT.print(f"state {state}")
    if inspection.static_dims:
        OUT.print(f"fixed input dimensions: {', '.join(inspection.static_dims)}")


@app.command()
@reading
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
    backend = load_backend(backend_of(artifact))
    outcome = backend.check(artifact, program, program.example_args, program.example_kwargs)
    if as_json:
        print_json({"artifact": str(artifact), **plain(outcome)})
    else:
        OUT.print(sentence(outcome))
    check_limit(outcome, max_error)


app.command()(reading(shell_command(mixed_precision.analyze)))
app.command()(shell_command(mixed_precision.recipe))
app.command()(reading(shell_command(mixed_precision.sweep)))
app.command()(reading(shell_command(rdo)))
app.command("diff")(reading(compare))
app.command()(reading(report))


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
    try:
        app()
    except errors.GraphOptError as error:
        ERR.print(f"[red]{type(error).__name__}[/red]: ", end="")
        ERR.print(str(error), markup=False, highlight=False)
        code = next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 1)
        sys.exit(code)
    except OSError as error:
        ERR.print("[red]OSError[/red]: ", end="")
        ERR.print(str(error), markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        ERR.print("interrupted; nothing was written")
        sys.exit(130)


if __name__ == "__main__":
    run()
