"""graphopt compress and lower: programs in, artifacts out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt import pipelines
from graphopt.backends import load_backend
from graphopt.backends.base import Artifact
from graphopt.backends.lowering import as_program, lower
from graphopt.backends.registry import ExportBackend, Target
from graphopt.backends.sets import SetArtifact
from graphopt.capture.mapped_archive import mapping_weights
from graphopt.cli.artifacts import (
    Checks,
    Limit,
    check_output,
    check_report,
    plain,
    sentence,
    write,
)
from graphopt.cli.common import ERR, OUT, Cluster, Json, Model, is_stream, print_json
from graphopt.cli.mixed_precision import BatchSize, is_recipe, read_data
from graphopt.cli.options import Fields, Given
from graphopt.cli.target_options import TargetFields
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.compressors.joint import AnyConfig
from graphopt.compressors.options import CompressOptions
from graphopt.config.base import read_yaml
from graphopt.config.joint import JointConfig
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.presets import DEFAULT_PRESET, preset, preset_names
from graphopt.errors import ConfigError, InputError
from graphopt.files import replaced, scratch
from graphopt.ir.program import Program
from graphopt.report.stored import as_stored
from graphopt.report.table import CompressionTable
from graphopt.run.synthetic_data import SYNTHETIC, synthetic_calls
from graphopt.search.mixed_precision.recipe import Recipe
from graphopt.specs.options import Options

__all__ = ["compress", "lower_program"]


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    """Where an artifact goes, in which form, and how it is checked.

    Attributes:
        output: Where to write; - is a .pt2 on standard output.
        backend: Target; the output's suffix decides when omitted.
        verify: Evaluate what is saved and compare, before it gets its name.
        verify_data: Inputs to compare on, as for analyze; the program's example when omitted.
        overwrite: Replace the output.
        max_error: See `Limit`.
        as_json: See `Json`.
    """

    output: Annotated[Path, typer.Option("--output", "-o")]
    backend: ExportBackend | None = None
    verify: bool = True
    verify_data: Annotated[Path | None, typer.Option(exists=True, dir_okay=False)] = None
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False
    max_error: Limit = None
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class CalibrationFiles(Options):
    """Data of a compression.

    Attributes:
        data: Calibration inputs, as for analyze, or "synthetic" for random tokens.
        batch_size: See `BatchSize`.
    """

    data: str | None = None
    batch_size: BatchSize = None

    def batches(self, program: Program, seed: int) -> list[Any] | None:
        """The calls; None where there are no data."""
        if self.data is None:
            return None
        if self.data == SYNTHETIC:
            return synthetic_calls(program, seed=seed)
        path = Path(self.data)
        if not path.is_file():
            raise InputError(f"--data {self.data}: there is no such file")
        return read_data(path, self.batch_size, program)


@dataclass(frozen=True, kw_only=True)
class WatchOptions(Cluster):
    """Where the work is done, and what is written and checked on the way.

    Attributes:
        dump_passes: Folder for the graph before and after each pass.
        verify_passes: Compare each pass with its input.
        report: Write the report here, too: .json or .html.
        low_memory: Leave weights on disk but for the one at work; outputs are not compared then.
    """

    dump_passes: Path | None = None
    verify_passes: Annotated[bool, typer.Option("--verify-passes")] = False
    report: Path | None = None
    low_memory: Annotated[bool, typer.Option("--low-memory")] = False

    @contextmanager
    def folder(self, output: Path) -> Iterator[Path | None]:
        """Where codes go: beside the output, and only with `low_memory`, where programs are mapped.

        Raises:
            InputError: The output has no place of its own.
        """
        if not self.low_memory:
            yield None
            return
        if is_stream(output):
            raise InputError("--low-memory needs an --output that is a file")
        with mapping_weights(), scratch(output) as folder:
            yield folder


def compress(
    model: Model,
    *,
    to: OutputOptions,
    config: Annotated[
        str,
        typer.Option(
            "--config",
            help="YAML or JSON config of palettization, quantization, pruning or several of them, a"
            f" recipe, or the name of a preset: {', '.join(preset_names())}.",
        ),
    ] = DEFAULT_PRESET,
    form: Annotated[Given, TargetFields()],
    calibration: CalibrationFiles,
    how: Annotated[
        Given,
        Fields(
            CompressOptions,
            "on_unmatched",
            "seed",
            "tune_steps",
            "device",
            "activation_memory",
            "work_dir",
        ),
    ],
    watch: WatchOptions,
) -> None:
    """Compress a program as a config or a recipe says and write it for a target."""
    started = time.perf_counter()
    target = check_output(to.output, to.backend, overwrite=to.overwrite)
    if watch.report is not None:
        check_report(watch.report, (".json", ".html"), overwrite=to.overwrite)
    with ExitStack() as stack:
        folder = stack.enter_context(watch.folder(to.output))
        workers = stack.enter_context(watch.workers())
        original = as_program(model)
        recipe = _recipe(config)
        wanted = _config(config) if recipe is None else recipe.to_config()
        batches = calibration.batches(original, how.get("seed", 0))
        if recipe is not None:
            recipe.check(original)
        how |= {"backend": target, "progress": False if to.as_json else None}
        how |= {"executor": workers, "mmap_dir": folder}
        how |= {"lowering": load_backend(target).options_among(form)}
        pipeline = pipelines.joint(wanted, batches, **how)
        program = pipeline.run(original, dump_dir=watch.dump_passes, verify=watch.verify_passes)
        table = as_stored(program, target)
        artifact = _lowered(program, target, form)
        checks = _checks(to, artifact.program, compare=folder is None)
        write(artifact, to.output, overwrite=to.overwrite, **checks)
    outcome = artifact.verification
    seconds = time.perf_counter() - started
    passes = [] if program.pass_report is None else program.pass_report.to_dicts()
    outcomes = {
        "output": str(to.output),
        "bytes": artifact.size,
        "overall_bits_per_weight": table.overall_bits_per_weight,
        "bits_per_weight": table.bits_per_weight,
        "seconds": seconds,
        "tensors": table.to_dicts(),
        "passes": passes,
        "verification": None if outcome is None else plain(outcome),
    }
    if watch.report is not None:
        page = {"before": original, "config": wanted, "recipe": recipe, "artifact": artifact}
        _write_report(watch.report, program, page, outcomes, overwrite=to.overwrite)
    # what goes to standard output is the program, if it goes there
    console = ERR if is_stream(to.output) else OUT
    if to.as_json:
        print_json(outcomes, stream=sys.stderr if is_stream(to.output) else None)
    else:
        console.print(table)
        if program.pass_report is not None and (watch.dump_passes or watch.verify_passes):
            console.print(program.pass_report)
        for line in _contents(to.output, artifact, table):
            console.print(line)
        console.print(
            f"{table.overall_bits_per_weight:.3f} bits per weight over all, {seconds:.1f} s"
        )
        if outcome is not None:
            console.print(sentence(outcome))
        elif watch.low_memory:
            console.print("outputs were not compared: that would read both programs into memory")


def _contents(output: Path, artifact: Artifact, table: CompressionTable) -> Iterator[str]:
    """Which file it is, how large, and what takes the room, line by line."""
    done, size = table.compressed, artifact.size
    stored = sum(-(-row.stored_bits // 8) for row in done)
    tensors = "1 compressed tensor" if len(done) == 1 else f"{len(done)} compressed tensors"
    yield f"{output}: {size:,} bytes for {artifact.backend.name}"
    if not done:
        yield "  no tensor is compressed"
        return
    # the target may have a form of its own, or pack the file
    packed = ", before it is packed" if stored > size else ""
    yield f"  {stored:,} bytes of {tensors}{packed}, {table.bits_per_weight:.3f} bits per weight"
    if not packed:
        yield f"  {size - stored:,} bytes of other tensors and the program"


def lower_program(model: Model, to: OutputOptions, form: Annotated[Given, TargetFields()]) -> None:
    """Write a program, compressed or not, or the entry points of a file, for a target."""
    target = check_output(to.output, to.backend, overwrite=to.overwrite)
    artifact = _lowered(model, target, form)
    is_set = isinstance(artifact, SetArtifact)
    checks = _checks_of_set(to) if is_set else _checks(to, artifact.program)
    write(artifact, to.output, overwrite=to.overwrite, **checks)
    outcome = artifact.verification
    stream = is_stream(to.output)
    if to.as_json:
        checked = None if outcome is None else plain(outcome)
        facts = {"output": str(to.output), "bytes": artifact.size, "verification": checked}
        print_json(facts, stream=sys.stderr if stream else None)
    else:
        console = ERR if stream else OUT
        console.print(f"{to.output}: {artifact.size:,} bytes")
        if outcome is not None:
            console.print(sentence(outcome))


def _lowered(program: Program | Path, target: Target, form: Given) -> Any:
    """The program, or that of a file, in the form of its target, which takes its own of the options."""
    return lower(program, target, **load_backend(target).options_among(form))


def _checks(to: OutputOptions, program: Program, *, compare: bool = True) -> Checks:
    """How what is written is compared, on calls as large as the example.

    Args:
        to: What was asked for.
        program: What is written.
        compare: Compare where nothing is asked for.
    """
    if to.verify_data is None:
        return {
            "verify": to.verify and (compare or to.max_error is not None),
            "max_error": to.max_error,
        }
    leaves = pytree.tree_leaves((program.example_args, program.example_kwargs))
    sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    calls = read_data(to.verify_data, sizes[0] if sizes else 1, program)
    return {"verify": calls, "max_error": to.max_error}


def _checks_of_set(to: OutputOptions) -> Checks:
    """How entry points are compared: each on its example.

    Raises:
        InputError: Something else is asked for.
    """
    if to.verify_data is not None or to.max_error is not None:
        raise InputError(
            "--verify-data and --max-error are for one program; entry points are compared on their"
            " examples by the rule of every save"
        )
    return {"verify": to.verify}


def _recipe(given: str) -> Recipe | None:
    """The recipe in a file, where it is one.

    Raises:
        BadParameter: It is a folder.
    """
    path = Path(given)
    if path.is_dir():
        raise typer.BadParameter(f"{given} is a directory", param_hint="--config")
    return Recipe.load(path) if path.is_file() and is_recipe(path) else None


def _config(given: str) -> AnyConfig:
    """A preset, or a config of one or several parts; one without a root key is of palettization.

    Raises:
        ConfigError: There is no such file or preset, or it is wrong.
    """
    path = Path(given)
    if not path.exists():
        if path.suffix in (".yaml", ".yml", ".json"):
            raise ConfigError(f"--config {given}: there is no such file")
        return preset(given)
    content = read_yaml(path, "config")
    joint = {
        "pruning",
        "palettization",
        "quantization",
        "magnitude_pruning_config",
        "quantization_config",
    }
    if isinstance(content, dict) and joint & set(content):
        return JointConfig.from_dict(content)
    if path.suffix == ".json":
        return KMeansPalettizerConfig.from_json(path)
    return KMeansPalettizerConfig.from_yaml(path)


def _write_report(
    path: Path,
    program: CompressedProgram,
    page: dict[str, Any],
    report: dict[str, Any],
    *,
    overwrite: bool,
) -> None:
    if path.suffix == ".html":
        program.report().to_html(path, **page, overwrite=overwrite)
        return
    with replaced(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        print_json(report, stream=file)
