"""compress: palettization and quantization in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.export import ExportedProgram

from graphopt.backends import load_backend
from graphopt.backends.lowering import as_program
from graphopt.compressors.compressed_program import CompressedProgram, compressed
from graphopt.compressors.fit_palettes import FitPalettes
from graphopt.compressors.tuning import Tune
from graphopt.config.joint import JointConfig
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.pruning import MagnitudePrunerConfig
from graphopt.config.quantization import QuantizerConfig
from graphopt.errors import InputError
from graphopt.fitting.sensitivity import LossFn
from graphopt.ir.program import Program
from graphopt.passes import (
    AnnotatePalettization,
    AnnotatePruning,
    AnnotateQuantization,
    ConvertQuantization,
    CorrectStatistics,
    FoldBatchNorm,
    ForgetReference,
    KeepReference,
    PalettizeWeights,
    PruneWeights,
    RaiseToVocabulary,
    RemoveUnused,
)
from graphopt.passes.calibrate_activations import CalibrateActivations
from graphopt.passes.pass_base import Pass
from graphopt.passes.pass_manager import run_passes
from graphopt.specs import ExportBackend

__all__ = ["AnyConfig", "compress", "joint_config", "joint_passes"]

AnyConfig = JointConfig | KMeansPalettizerConfig | QuantizerConfig | MagnitudePrunerConfig


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
    joint = joint_config(config)
    data = None if calibration_data is None else list(calibration_data)
    passes = joint_passes(
        joint,
        data,
        loss_fn,
        backend=backend,
        correct_statistics=correct_statistics,
        tune_steps=tune_steps,
        seed=seed,
        progress=progress,
    )
    program = as_program(model, example_inputs, example_kwargs)
    run_passes(program.graph_module, passes)
    return compressed(program)


def joint_passes(
    joint: JointConfig,
    data: list[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    backend: ExportBackend | str | None = None,
    correct_statistics: bool = True,
    tune_steps: int = 0,
    on_unmatched: Literal["error", "warn"] = "error",
    on_unobserved: Literal["error", "skip"] = "error",
    fold_batch_norm: bool | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[Pass, ...]:
    """The passes that `compress` runs, in order; arguments as there.

    Args:
        joint: What is asked for.
        data: Calibration data.
        loss_fn: Loss of the pairs in `data`.
        backend: Target whose fusions count.
        correct_statistics: Let batch norms and biases take up what tables have shifted.
        tune_steps: Steps of tuning per block.
        on_unmatched: Whether a config key that matches nothing is an error or a warning.
        on_unobserved: "skip" leaves activations without a usable range in float.
        fold_batch_norm: Fold batch norms before weights are palettized; None does where activations
            are quantized too.
        seed: Seed of everything that is drawn.
        progress: Show bars.
    """
    inputs = data if data is None or loss_fn is None else [pair[0] for pair in data]
    passes: list[Pass] = [RaiseToVocabulary()]
    quantization = joint.quantization
    compared = inputs is not None and (correct_statistics or tune_steps > 0)
    compared &= joint.palettization is not None or joint.pruning is not None
    if fold_batch_norm is None:
        # targets fuse a convolution with its activation, not with a norm between them
        fold_batch_norm = (joint.palettization is not None or joint.pruning is not None) and (
            quantization is not None and quantization.has_activations
        )
    if fold_batch_norm:
        passes += [FoldBatchNorm(), RemoveUnused()]
    if compared:
        passes.append(KeepReference())
    if joint.pruning is not None:
        passes += [AnnotatePruning(joint.pruning, on_unmatched), PruneWeights()]
    if joint.palettization is not None:
        passes += [
            AnnotatePalettization(joint.palettization, on_unmatched),
            FitPalettes(data, loss_fn, seed, progress),
            PalettizeWeights(seed=seed),
        ]
    if compared and correct_statistics:
        passes.append(CorrectStatistics(inputs or ()))
    if compared and tune_steps:
        passes.append(Tune(inputs or (), tune_steps, seed, progress))
    if compared:
        passes.append(ForgetReference())
    if quantization is not None:
        fused = None if backend is None else load_backend(backend).capabilities.fused_activations
        passes += [
            AnnotateQuantization(quantization, on_unmatched, fused),
            CalibrateActivations(inputs, on_unobserved, progress),
            FoldBatchNorm(),
            ConvertQuantization(),
        ]
    return (*passes, RemoveUnused())


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
