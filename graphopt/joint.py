"""compress: palettization and quantization in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from graphopt.api import as_program
from graphopt.config.joint import JointConfig
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.quantization import QuantizerConfig
from graphopt.errors import InputError
from graphopt.layerwise import as_batch
from graphopt.palettization import KMeansPalettizer
from graphopt.pass_manager import run_passes
from graphopt.passes import CorrectBias, FoldBatchNorm, ReestimateBatchNorm, RemoveUnused
from graphopt.program import CompressedProgram, Program
from graphopt.progress import track
from graphopt.quantization import Quantizer
from graphopt.sensitivity import LossFn
from graphopt.specs import ExportBackend
from graphopt.tuning import tune

__all__ = ["compress"]

AnyConfig = JointConfig | KMeansPalettizerConfig | QuantizerConfig


def compress(
    model: nn.Module | ExportedProgram | Program | str | Path,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    config: AnyConfig | Mapping[str, Any] | str | Path | None = None,
    calibration_data: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    backend: ExportBackend | str | None = None,
    correct_statistics: bool = True,
    tune_steps: int = 0,
    seed: int = 0,
    progress: bool | None = None,
) -> CompressedProgram:
    """Compress a model in one capture and one calibration.

    >>> program = graphopt.compress(model, example, config, calibration_data=batches)
    >>> program.save("model.aimodel")

    Weights are palettized first, with the algorithms that their specs name; then batch norms and
    biases take up what tables have shifted; then, if asked for, tables are tuned; activations and the
    other weights are quantized last, so that their ranges are those of the compressed weights.

    Args:
        model: A module, an exported program, a `Program` or a .pt2 file; it is never changed.
        example_inputs: Inputs of one call.
        config: A `JointConfig`, one of its parts, or a mapping or YAML file of either form; 4-bit
            palettes everywhere by default.
        calibration_data: Inputs of one call each: a tensor, a tuple or list of positional ones, or a
            dict of keyword ones; with `loss_fn`, pairs (inputs, target). Needed for quantized
            activations, for the algorithms "skm" and "gptq", for statistics and for tuning.
        loss_fn: `loss_fn(output, target)`, the mean over a batch; None needs no labels.
        example_kwargs: Keyword inputs of the example call.
        backend: Target whose fusions decide where activations are rounded; None is no particular.
        correct_statistics: Estimate batch norms again and correct biases after palettization.
        tune_steps: Steps of tuning per block (`graphopt.tune`); 0 leaves it out.
        seed: Seed of everything that is drawn.
        progress: Show bars; None shows them on a terminal.

    Returns:
        A program with `.module()`, `.exported_program`, `.report()` and `.save(path)`.

    Raises:
        CaptureError: The model cannot be exported.
        ConfigError: The config is wrong or matches nothing.
        CompressionError: A weight contains NaN or Inf.
        CalibrationError: Data are needed and missing, or leave activations without a range.
        InputError: Data do not fit the program, or the config is of no known kind.
    """
    joint = _joint(config)
    data = None if calibration_data is None else list(calibration_data)
    inputs = data
    if data is not None and loss_fn is not None:
        inputs = [pair[0] for pair in data]
    program: Program = as_program(model, example_inputs, example_kwargs)
    if joint.palettization is not None:
        program = _palettized(
            program, joint, data, inputs, loss_fn, correct_statistics, tune_steps, seed, progress
        )
    if joint.quantization is None:
        assert isinstance(program, CompressedProgram)
        return program
    quantizer = Quantizer(program, joint.quantization)
    quantizer.prepare(backend=backend)
    if inputs is not None:
        quantizer.calibrate(inputs, progress=progress)
    return quantizer.program()


def _palettized(
    program: Program, joint: JointConfig, data: list[Any] | None, inputs: list[Any] | None,
    loss_fn: LossFn | None, correct: bool, tune_steps: int, seed: int, progress: bool | None,
) -> CompressedProgram:  # fmt: skip
    if joint.quantization is not None and joint.quantization.has_activations:
        # targets fuse a convolution with its activation, not with a norm between them
        run_passes(program.graph_module, [FoldBatchNorm(), RemoveUnused()])
    reference = program.copy()
    palettizer = KMeansPalettizer(program, joint.palettization)
    prepared = palettizer.prepare(seed=seed, progress=progress)
    algorithms = set(palettizer.algorithms.values())
    if data is not None and algorithms - {"kmeans"}:
        if loss_fn is None:
            palettizer.calibrate(data, progress=progress)
        else:
            with palettizer.calibration_mode(loss_fn=loss_fn, progress=progress) as calibrator:
                for batch, target in track(data, "gradients", len(data), enabled=progress):
                    args, kwargs = as_batch(batch)
                    calibrator.step(prepared(*args, **kwargs), target)
    done = palettizer.program()
    if inputs is not None and correct and algorithms != {"gptq"}:
        # feedback against outputs leaves nothing for them to correct
        exact = reference.graph_module
        run_passes(
            done.graph_module, [ReestimateBatchNorm(inputs, exact), CorrectBias(inputs, exact)]
        )
    if tune_steps and inputs is not None:
        done = tune(done, reference, inputs, steps=tune_steps, seed=seed, progress=progress)
    return done


def _joint(config: AnyConfig | Mapping[str, Any] | str | Path | None) -> JointConfig:
    if config is None:
        return JointConfig(palettization=KMeansPalettizerConfig())
    if isinstance(config, JointConfig):
        return config
    if isinstance(config, KMeansPalettizerConfig):
        return JointConfig(palettization=config)
    if isinstance(config, QuantizerConfig):
        return JointConfig(quantization=config)
    if isinstance(config, str | Path):
        return JointConfig.from_yaml(config)
    if isinstance(config, Mapping):
        return JointConfig.from_dict(dict(config))
    raise InputError(
        "config must be a JointConfig, a KMeansPalettizerConfig, a QuantizerConfig, a mapping or a"
        f" YAML file, got {type(config).__name__}"
    )
