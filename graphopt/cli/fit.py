"""graphopt fit: the best artifact of a size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from graphopt.backends import load_backend
from graphopt.backends.lowering import as_program
from graphopt.cli.artifacts import check_output, sentence
from graphopt.cli.common import OUT, Json, Model, print_json
from graphopt.cli.compress import CalibrationFiles
from graphopt.cli.options import Fields, Given
from graphopt.cli.target_options import TargetFields
from graphopt.search.budget.fit import fit as run_fit
from graphopt.search.budget.options import FitOptions
from graphopt.specs.artifact import read_bytes
from graphopt.specs.options import Options

__all__ = ["fit"]


@dataclass(frozen=True, kw_only=True)
class FitFiles(Options):
    """What is made, and how large it may be.

    Attributes:
        output: Where to write; the suffix names the target.
        size: Bytes of the file, such as 12MB or 400KiB.
        as_json: See `Json`.
    """

    output: Annotated[Path, typer.Option("--output", "-o")]
    size: Annotated[str, typer.Option("--size", "-s")]
    as_json: Json = False


def fit(
    model: Model,
    to: FitFiles,
    form: Annotated[Given, TargetFields()],
    calibration: CalibrationFiles,
    how: Annotated[
        Given,
        Fields(FitOptions, "candidates", "mode", "held_out", "verify", "overwrite", "seed"),
    ],
) -> None:
    """Make the best artifact of a size: measure, choose, fit, lower, compare with PyTorch, save."""
    target = check_output(to.output, None, overwrite=how["overwrite"])
    asked, program = read_bytes(to.size), as_program(model)
    result = run_fit(
        program,
        None,
        calibration.batches(program, how["seed"]),
        size=asked,
        path=to.output,
        lowering=load_backend(target).options_among(form),
        progress=False if to.as_json else None,
        **how,
    )
    if to.as_json:
        print_json(result.to_dict())
        return
    OUT.print(result)
    if result.artifact.verification is not None:
        OUT.print(sentence(result.artifact.verification))
