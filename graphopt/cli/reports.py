"""graphopt diff and report: what compression did to a program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.backends.lowering import as_program
from graphopt.cli.artifacts import check_report
from graphopt.cli.common import OUT, Json, Model, print_json
from graphopt.cli.mixed_precision import BatchSize, read_data
from graphopt.inspection import diff, save_graph, write_page

__all__ = ["compare", "report"]

Before = Annotated[
    Path, typer.Argument(help="The .pt2 before compression.", exists=True, dir_okay=False)
]
Inputs = Annotated[
    Path | None,
    typer.Option(
        help="Inputs, as for analyze, on which outputs are compared.", exists=True, dir_okay=False
    ),
]


def compare(
    before: Before,
    after: Model,
    data: Inputs = None,
    batch_size: BatchSize = None,
    graph: Annotated[
        Path | None, typer.Option(help="Write both graphs side by side, too, as an .html page.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show type, size and errors of each layer before and after."""
    first, second = as_program(before), as_program(after)
    batches = None if data is None else read_data(data, batch_size, first)
    difference = diff(first, second, batches)
    if graph is not None:
        save_graph(second, graph, before=first)
    if as_json:
        print_json(difference.to_dict())
    else:
        OUT.print(difference)


def report(
    program: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write, .html.")],
    before: Annotated[
        Path | None, typer.Option(help="The .pt2 before compression.", exists=True, dir_okay=False)
    ] = None,
    data: Inputs = None,
    batch_size: BatchSize = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Write one self-contained HTML page about a compressed program."""
    check_report(output, (".html",), overwrite=overwrite)
    shown, source = as_program(program), None if before is None else as_program(before)
    batches = None if data is None else read_data(data, batch_size, shown)
    path = write_page(shown, output, before=source, data=batches, overwrite=overwrite)
    OUT.print(f"{path}: {path.stat().st_size:,} bytes")
