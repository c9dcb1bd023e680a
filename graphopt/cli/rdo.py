"""graphopt rdo: rate-distortion-optimised quantization from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.backends.lowering import as_program
from graphopt.cli.common import OUT, Cluster, Json, Model, print_json
from graphopt.cli.mixed_precision import BatchSize, Data, read_data
from graphopt.cli.options import Fields, Given
from graphopt.config.base import read_yaml
from graphopt.errors import ConfigError
from graphopt.search.rdo.config import RDOConfig
from graphopt.search.rdo.options import RunOptions
from graphopt.search.rdo.pipeline import optimize

__all__ = ["rdo"]


@dataclass(frozen=True, kw_only=True)
class RDOFiles(Cluster):
    """What a run reads besides the model.

    Attributes:
        data: See `Data`.
        batch_size: See `BatchSize`.
        evaluation: Inputs, as for --data, on which outputs are compared.
    """

    data: Data
    batch_size: BatchSize = None
    evaluation: Annotated[Path | None, typer.Option(exists=True, dir_okay=False)] = None


def rdo(
    model: Model,
    files: RDOFiles,
    settings: Annotated[
        Given, Fields(RDOConfig, "target_bits", "candidates", "family", "backend", "seed")
    ],
    run: Annotated[
        Given,
        Fields(RunOptions, "out", "overwrite", "resume", "activation_memory", "work_dir"),
    ],
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="RDOConfig as YAML.", exists=True, dir_okay=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize to a mean number of bits, block by block; writes a folder with program and report."""
    whole: dict[str, Any] = {} if config is None else _mapping(config)
    if "target_bits" in settings:
        whole.pop("rate_weight", None)
    whole |= settings
    if whole.get("target_bits") is None and whole.get("rate_weight") is None:
        raise ConfigError("give --target-bits, or target_bits or rate_weight in --config")
    program, others = as_program(model), files.evaluation
    held_out = None if others is None else read_data(others, files.batch_size, program)
    with files.workers() as workers:
        done = optimize(
            program,
            None,
            read_data(files.data, files.batch_size, program),
            RDOConfig.from_dict(whole),
            evaluation_data=held_out,
            progress=False if as_json else None,
            executor=workers,
            **run,
        )
    if as_json:
        print_json({"output": str(run["out"]), **done.report.to_dict()})
    else:
        OUT.print(done.report)


def _mapping(path: Path) -> dict[str, Any]:
    content = read_yaml(path, "RDOConfig")
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name}: expected a mapping, got {type(content).__name__}")
    return content
