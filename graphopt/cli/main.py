"""The commands of `graphopt`; `exit_codes` says what they end with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path
from typing import Annotated

import typer

from graphopt import __version__, errors
from graphopt.backends import load_backend
from graphopt.backends.lowering import as_program
from graphopt.backends.registry import DEFAULT
from graphopt.cli import mixed_precision
from graphopt.cli.artifacts import Limit, backend_of, check_limit, plain, sentence
from graphopt.cli.common import ERR, OUT, Json, Model, print_json, reading
from graphopt.cli.compress import compress, lower_program
from graphopt.cli.doctor import doctor
from graphopt.cli.exit_codes import code_of, epilog
from graphopt.cli.fit import fit
from graphopt.cli.init import init
from graphopt.cli.messages import grouped_warnings
from graphopt.cli.options import shell_command
from graphopt.cli.rdo import rdo
from graphopt.cli.reports import compare, report
from graphopt.inspection import inspect_program, save_graph

__all__ = ["app", "run"]

_ARTIFACT = f"model{DEFAULT.suffix}"  # of examples

app = typer.Typer(
    help="Compress exported PyTorch programs for edge targets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables clip names of options at 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        OUT.print(f"graphopt {__version__}", highlight=False)
        raise typer.Exit


@app.callback(epilog=epilog(f"fit model.pt2 --data data.pt --size 12MB -o {_ARTIFACT}"))
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Compress exported PyTorch programs for edge targets."""
    del version


def _command(function: Callable[..., None], name: str, example: str, *, reads: bool = True) -> None:
    """Add a command; one that reads programs has the option `--trust`."""
    command = shell_command(function)
    whole = cleandoc(function.__doc__ or "").partition("\n\n")[0]  # the list would cut it short
    told = app.command(name, epilog=epilog(f"{name} {example}"), short_help=whole)
    told(reading(command) if reads else command)


def inspect(
    model: Model,
    graph: Annotated[
        Path | None,
        typer.Option(
            help="Write the graph, too: .html to walk through, .explorer.json for Model Explorer, .svg,"
            " .png, .graphml, .gexf, .json."
        ),
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


_command(fit, "fit", f"model.pt2 --data data.pt --size 12MB -o {_ARTIFACT}")
_command(compress, "compress", f"model.pt2 --config w4 -o {_ARTIFACT}")
_command(lower_program, "lower", f"compressed.pt2 -o {_ARTIFACT} --precision float16")
_command(inspect, "inspect", "model.pt2 --graph model.svg")
_command(init, "init", "model.pt2 --preset bert -o config.yaml")
_command(verify, "verify", f"{_ARTIFACT} --reference compressed.pt2 --max-error 1e-3")
_command(compare, "diff", "model.pt2 compressed.pt2 --data data.pt")
_command(report, "report", "compressed.pt2 --before model.pt2 -o page.html")
_command(mixed_precision.analyze, "analyze", "model.pt2 --data data.pt --mode fast -o model.jsonl")
_command(mixed_precision.recipe, "recipe", "model.jsonl --bpw 4 -o recipe.yaml", reads=False)
_command(mixed_precision.sweep, "sweep", "model.jsonl model.pt2 --data data.pt -o curve.jsonl")
_command(rdo, "rdo", "model.pt2 --data data.pt --target-bits 4 -o out/rdo")
_command(doctor, "doctor", "--json", reads=False)


def run() -> None:
    """Entry point: run the command and turn our errors into exit codes."""
    try:
        with grouped_warnings():
            app()
    except errors.GraphOptError as error:
        ERR.print(f"[red]{type(error).__name__}[/red]: ", end="")
        ERR.print(str(error), markup=False, highlight=False)
        sys.exit(code_of(error))
    except OSError as error:
        ERR.print("[red]OSError[/red]: ", end="")
        ERR.print(str(error), markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        ERR.print("interrupted; nothing was written")
        sys.exit(130)


if __name__ == "__main__":
    run()
