"""graphopt compress and lower: programs in, artifacts out."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt import pipelines
from graphopt.backends.lowering import as_program, lower
from graphopt.backends.registry import ExportBackend
from graphopt.cli.artifacts import (
    Delegate,
    Limit,
    Precision,
    Tables,
    check_limit,
    check_output,
    check_report,
    options_of,
    plain,
    sentence,
    write,
)
from graphopt.cli.common import ERR, OUT, Json, Model, is_stream, print_json
from graphopt.cli.mixed_precision import BatchSize, is_recipe, read_data
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.compressors.joint import AnyConfig
from graphopt.config.base import read_yaml
from graphopt.config.joint import JointConfig
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.files import replaced
from graphopt.ir.program import Program
from graphopt.report.stored import as_stored
from graphopt.search.mixed_precision import Recipe

__all__ = ["compress", "lower_program"]

Output = Annotated[
    Path, typer.Option("--output", "-o", help="Where to write; - is a .pt2 on standard output.")
]
Target = Annotated[
    ExportBackend | None, typer.Option(help="Target; the output's suffix decides when omitted.")
]
Verify = Annotated[bool, typer.Option(help="Evaluate what was saved and compare.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output.")]


def compress(
    model: Model,
    config: Annotated[
        Path,
        typer.Option(
            help="YAML or JSON config of palettization, quantization, pruning or several of them, or"
            " a recipe.",
            exists=True,
            dir_okay=False,
        ),
    ],
    output: Output,
    backend: Target = None,
    precision: Precision = None,
    delegate: Delegate = None,
    tables: Tables = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Calibration inputs, as for analyze.", exists=True, dir_okay=False),
    ] = None,
    batch_size: BatchSize = 32,
    verify: Verify = True,
    overwrite: Overwrite = False,
    lenient: Annotated[
        bool, typer.Option("--lenient", help="Config keys that match nothing only warn.")
    ] = False,
    dump_passes: Annotated[
        Path | None, typer.Option(help="Folder for the graph before and after each pass.")
    ] = None,
    verify_passes: Annotated[
        bool, typer.Option("--verify-passes", help="Compare each pass with its input.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write the report here, too: .json or .html.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    max_error: Limit = None,
    as_json: Json = False,
) -> None:
    """Compress a program as a config or a recipe says and write it for a target."""
    started = time.perf_counter()
    target = check_output(output, backend, overwrite=overwrite)
    if report is not None:
        check_report(report, (".json", ".html"), overwrite=overwrite)
    original = as_program(model)
    wanted = None if is_recipe(config) else _config(config)
    batches = None if data is None else read_data(data, batch_size)
    if wanted is None:
        recipe = Recipe.load(config)
        recipe.check(original)
        wanted = recipe.to_config()
    pipeline = pipelines.joint(
        wanted,
        batches,
        backend=target,
        seed=seed,
        progress=False if as_json else None,
        on_unmatched="warn" if lenient else "error",
    )
    program = pipeline.run(original, dump_dir=dump_passes, verify=verify_passes)
    table = as_stored(program, target)
    artifact = lower(program, target, **options_of(target, precision, delegate, tables))
    write(artifact, output, overwrite=overwrite)
    outcome = artifact.verify() if verify else None
    seconds = time.perf_counter() - started
    passes = [] if program.pass_report is None else program.pass_report.to_dicts()
    found = {
        "output": str(output),
        "bytes": artifact.size,
        "bits_per_weight": table.bits_per_weight,
        "seconds": seconds,
        "tensors": table.to_dicts(),
        "passes": passes,
        "verification": None if outcome is None else plain(outcome),
    }
    if report is not None:
        _write_report(report, program, original, found, overwrite=overwrite)
    # what goes to standard output is the program, if it goes there
    console = ERR if is_stream(output) else OUT
    if as_json:
        print_json(found, stream=sys.stderr if is_stream(output) else None)
    else:
        console.print(table)
        if program.pass_report is not None and (dump_passes or verify_passes):
            console.print(program.pass_report)
        console.print(
            f"{output}: {artifact.size:,} bytes, {table.bits_per_weight:.3f} bits per compressed"
            f" weight, {seconds:.1f} s"
        )
        if outcome is not None:
            console.print(sentence(outcome))
    check_limit(outcome, max_error)


def lower_program(
    model: Model,
    output: Output,
    backend: Target = None,
    precision: Precision = None,
    delegate: Delegate = None,
    tables: Tables = None,
    verify: Verify = True,
    overwrite: Overwrite = False,
    max_error: Limit = None,
    as_json: Json = False,
) -> None:
    """Write a program, compressed or not, for a target."""
    target = check_output(output, backend, overwrite=overwrite)
    artifact = lower(as_program(model), target, **options_of(target, precision, delegate, tables))
    write(artifact, output, overwrite=overwrite)
    outcome = artifact.verify() if verify else None
    stream = is_stream(output)
    if as_json:
        checked = None if outcome is None else plain(outcome)
        found = {"output": str(output), "bytes": artifact.size, "verification": checked}
        print_json(found, stream=sys.stderr if stream else None)
    else:
        console = ERR if stream else OUT
        console.print(f"{output}: {artifact.size:,} bytes")
        if outcome is not None:
            console.print(sentence(outcome))
    check_limit(outcome, max_error)


def _config(path: Path) -> AnyConfig:
    """A config of one or several parts; one without a root key is of palettization."""
    found = read_yaml(path, "config")
    joint = {
        "pruning",
        "palettization",
        "quantization",
        "magnitude_pruning_config",
        "quantization_config",
    }
    if isinstance(found, dict) and joint & set(found):
        return JointConfig.from_dict(found)
    if path.suffix == ".json":
        return KMeansPalettizerConfig.from_json(path)
    return KMeansPalettizerConfig.from_yaml(path)


def _write_report(
    path: Path,
    program: CompressedProgram,
    before: Program,
    found: dict[str, Any],
    *,
    overwrite: bool,
) -> None:
    if path.suffix == ".html":
        program.report().to_html(path, before=before, overwrite=overwrite)
        return
    with replaced(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        print_json(found, stream=file)
