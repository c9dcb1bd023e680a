"""compress: palettization and quantization in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.export import ExportedProgram
from typing_extensions import Unpack

from graphopt.backends.lowering import as_program
from graphopt.capture import capture
from graphopt.compressors.compressed_program import CompressedSet
from graphopt.compressors.flow import joint_pipeline
from graphopt.compressors.options import CompressKeywords, CompressOptions
from graphopt.config.joint import JointConfig
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.pruning import MagnitudePrunerConfig
from graphopt.config.quantization import QuantizerConfig
from graphopt.errors import InputError
from graphopt.fitting.sensitivity import LossFn
from graphopt.ir.program import Program
from graphopt.ir.program_set import ProgramSet
from graphopt.run.set_calls import merged_calls
from graphopt.run.synthetic_data import SYNTHETIC, synthetic_calls

__all__ = ["AnyConfig", "compress", "joint_config"]

AnyConfig = JointConfig | KMeansPalettizerConfig | QuantizerConfig | MagnitudePrunerConfig


def compress(
    model: nn.Module | ExportedProgram | Program | ProgramSet | str | Path,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    config: AnyConfig | Mapping[str, Any] | str | Path | None = None,
    calibration_data: Iterable[Any] | Literal["synthetic"] | None = None,
    loss_fn: LossFn | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = "auto",
    **options: Unpack[CompressKeywords],
) -> Any:
    """Compress a model in one capture and one calibration.

    >>> config = {"palettization": {}}  # 4-bit tables
    >>> program = graphopt.compress(model, example, config, calibration_data=batches)
    >>> program.save("model.pt2").name
    'model.pt2'

    Weights are palettized first, with the algorithms that their specs name; then batch norms and
    biases take up what tables have shifted; then activations and the other weights are quantized, so
    that their ranges are those of the compressed weights; last, if asked for, all of it is tuned.

    Args:
        model: A module, an exported program, a `Program`, a `ProgramSet` or a .pt2 file; it is never
            changed. Of a set each shared weight is decided once, from the data of all entry points.
        example_inputs: Inputs of one call.
        config: A `JointConfig`, one of its parts, or a mapping or YAML file of either form; 4-bit
            palettes everywhere by default.
        calibration_data: Inputs of one call each: a tensor, a tuple or list of positional ones, or a
            dict of keyword ones; for a set, {entry point: calls}, or (entry point, inputs) pairs
            and `CallSequence` of such. With `loss_fn`, pairs (inputs, target). Needed for quantized
            activations, for the algorithms "skm" and "gptq", for statistics and for tuning.
            "synthetic" draws random tokens for models that look tokens up; the report says so.
        loss_fn: `loss_fn(output, target)`, the mean over a batch; None needs no labels.
        example_kwargs: Keyword inputs of the example call.
        dynamic_shapes: As for `graphopt.capture`, where the model is a module: "auto" leaves sizes open,
            as calls on other data need; None fixes those of the example, which takes half as long and
            is enough for an artifact of one size.
        options: How it runs, the fields of `graphopt.compressors.options.CompressOptions`:
            `backend` (target whose fusions decide where activations are rounded and whose tables
            decide the form of weights with a `max_table_share`; none in particular), `lowering`
            (options of its `lower` that change what it holds), `correct_statistics` (estimate batch
            norms again and correct biases after palettization; True), `tune_steps` (steps of tuning,
            see `graphopt.tune`, with one in eight calls held out; 0 leaves it out), `on_unmatched`
            ("error" or "warn" for config keys that match nothing), `on_unobserved` ("error",
            or "skip" to leave activations without a usable range in float), `fold_batch_norm` (before
            weights are palettized; by default where activations are quantized too), `seed` (of
            everything that is drawn; 0) and `progress` (show bars; None shows them on a terminal).

    Returns:
        A program with `.module()`, `.exported_program`, `.report()` and `.save(path)`; of a set a
        `CompressedSet`.

    Raises:
        CaptureError: The model cannot be exported.
        ConfigError: The config is wrong or matches nothing.
        CompressionError: A weight contains NaN or Inf.
        CalibrationError: Data are needed and missing, or leave activations without a range.
        InputError: Data do not fit the program, or the config is of no known kind.
    """
    if isinstance(model, str | Path):
        captured: Any = capture(model, example_inputs, example_kwargs)
        model, example_inputs, example_kwargs = captured, None, None
    if isinstance(model, ProgramSet):
        given: Any = calibration_data
        if given is not None and not isinstance(given, str):
            given = merged_calls(model, given)
        merged = model.merged()
        made = compress(merged, merged.example_args, config, given, loss_fn, **options)
        return CompressedSet(model.split(made).methods, made)
    how = CompressOptions.of("compress", options)
    whole = joint_config(config)
    data: Iterable[Any] | None
    if isinstance(calibration_data, str):
        if calibration_data != SYNTHETIC:
            raise InputError(
                f"calibration_data={calibration_data!r}: give a list of calls, or {SYNTHETIC!r}"
            )
        program = as_program(model, example_inputs, example_kwargs, dynamic_shapes)
        data = synthetic_calls(program, seed=how.seed)
        return joint_pipeline("compress", whole, data, loss_fn, how).run(program)
    data = calibration_data
    pipeline = joint_pipeline("compress", whole, data, loss_fn, how)
    return pipeline.run(model, example_inputs, example_kwargs, dynamic_shapes=dynamic_shapes)


def joint_config(config: AnyConfig | Mapping[str, Any] | str | Path | None) -> JointConfig:
    """A `JointConfig` from either part, a mapping, a file, or None for 4-bit palettes everywhere.

    Raises:
        InputError: It is of another kind.
    """
    if config is None:
        return JointConfig(palettization=KMeansPalettizerConfig())
    if isinstance(config, JointConfig):
        return config
    if isinstance(config, KMeansPalettizerConfig):
        return JointConfig(palettization=config)
    if isinstance(config, QuantizerConfig):
        return JointConfig(quantization=config)
    if isinstance(config, MagnitudePrunerConfig):
        return JointConfig(pruning=config)
    if isinstance(config, str | Path):
        return JointConfig.from_yaml(config)
    if isinstance(config, Mapping):
        return JointConfig.from_dict(dict(config))
    raise InputError(
        "config must be a JointConfig, a KMeansPalettizerConfig, a QuantizerConfig, a mapping or a"
        f" YAML file, got {type(config).__name__}"
    )
