"""graphopt rdo: rate-distortion-optimised quantization from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from graphopt.backends.registry import ExportBackend
from graphopt.cli.common import OUT, Json, Model, print_json
from graphopt.cli.mixed_precision import BatchSize, Data, read_data
from graphopt.config.base import read_yaml
from graphopt.errors import ConfigError
from graphopt.search.rdo import RDOConfig, optimize

__all__ = ["rdo"]


def rdo(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="RDOConfig as YAML.", exists=True, dir_okay=False),
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Largest mean of bits per weight, scales included.")
    ] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Such as '4,6,8' or 'int4 b32,int8'.")
    ] = None,
    family: Annotated[
        Literal["integer", "palette"] | None, typer.Option(help="What a plain number of bits is.")
    ] = None,
    backend: Annotated[
        ExportBackend | None,
        typer.Option(help="Target whose sizes and limits count."),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="Inputs, as for --data, on which outputs are compared.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    batch_size: BatchSize = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume/--restart", help="Go on with an unfinished run, or begin anew."),
    ] = True,
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is drawn.")] = None,
    as_json: Json = False,
) -> None:
    """Quantize to a mean number of bits, block by block; writes a folder with program and report."""
    settings: dict[str, Any] = {} if config is None else _mapping(config)
    if target_bits is not None:
        settings["target_bits"] = target_bits
        settings.pop("rate_weight", None)
    if candidates is not None:
        settings["candidates"] = [_number(each.strip()) for each in candidates.split(",")]
    given = {"family": family, "backend": backend, "seed": seed}
    settings |= {key: value for key, value in given.items() if value is not None}
    if settings.get("target_bits") is None and settings.get("rate_weight") is None:
        raise ConfigError("give --target-bits, or target_bits or rate_weight in --config")
    checked = None if evaluation is None else read_data(evaluation, batch_size)
    done = optimize(
        model,
        None,
        read_data(data, batch_size),
        RDOConfig.from_dict(settings),
        out=output,
        overwrite=overwrite,
        resume=resume,
        evaluation_data=checked,
        progress=False if as_json else None,
    )
    if as_json:
        print_json({"output": str(output), **done.report.to_dict()})
    else:
        OUT.print(done.report)


def _mapping(path: Path) -> dict[str, Any]:
    found = read_yaml(path, "RDOConfig")
    if not isinstance(found, dict):
        raise ConfigError(f"{path.name}: expected a mapping, got {type(found).__name__}")
    return found


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text
