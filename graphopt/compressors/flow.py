"""The passes of every flow, in order: the one place that says what runs when."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from graphopt.backends import load_backend
from graphopt.backends.raising import RaiseToVocabulary
from graphopt.compressors.calls import CalibrationCalls
from graphopt.compressors.options import CompressOptions
from graphopt.compressors.pipeline import Pipeline
from graphopt.config.joint import JointConfig
from graphopt.config.pruning import MagnitudePrunerConfig
from graphopt.config.quantization import QuantizerConfig
from graphopt.fitting.sensitivity import LossFn
from graphopt.passes import (
    AnnotatePalettization,
    AnnotatePruning,
    AnnotateQuantization,
    ConvertQuantization,
    CorrectStatistics,
    DetectSparsity,
    FitIntegers,
    FoldBatchNorm,
    FoldComputedWeights,
    FoldPadding,
    ForgetReference,
    KeepReference,
    MigrateScales,
    PalettizeWeights,
    PruneWeights,
    QuantizeCaches,
    RemoveUnused,
)
from graphopt.passes.calibrate_activations import CalibrateActivations
from graphopt.passes.fit_palettes import FitPalettes
from graphopt.passes.pass_base import Pass
from graphopt.passes.tune import Tune
from graphopt.run.calibration_data import data_list
from graphopt.schemes.forms import Held

__all__ = ["after_annotation", "joint_pipeline"]


def joint_pipeline(
    name: str,
    joint: JointConfig,
    data: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    options: CompressOptions | None = None,
) -> Pipeline:
    """The pipeline of one config; every compressor, `compress` and the shell run what this builds.

    Weights are pruned and palettized first; then batch norms and biases take up what that has
    shifted; activations and the other weights are quantized behind that, so that their ranges are
    those of the compressed weights; then all of it is tuned together.

    Args:
        name: Its name for people.
        joint: What becomes of which tensor.
        data: Calibration inputs of one call each; pairs (inputs, target) with `loss_fn`.
        loss_fn: `loss_fn(output, target)`; None needs no labels.
        options: How it runs; the defaults of `CompressOptions` when None.

    Raises:
        InputError: The data hold no call, or no pairs where there is a `loss_fn`.
        CalibrationError: There are steps of tuning and no data.
    """
    how = CompressOptions() if options is None else options
    given = data_list(data)
    if given is None and how.tune_steps < 1:
        pairs = calls = None
    else:
        pairs = CalibrationCalls.of(given or [], how)
        calls = pairs.inputs(loss_fn)
    shifting = joint.palettization is not None or joint.pruning is not None
    quantization = joint.quantization
    passes: list[Pass] = [RaiseToVocabulary(), FoldComputedWeights()]
    fold = how.fold_batch_norm
    if fold is None:
        # targets fuse a convolution with its activation, not with a norm between them
        fold = shifting and quantization is not None and quantization.has_activations
    if fold:
        passes += [FoldBatchNorm(), RemoveUnused()]
    changes: list[Pass] = []
    if joint.pruning is not None:
        changes += _zeros(joint.pruning, how)
    if joint.palettization is not None:
        changes += _tables(joint, pairs, loss_fn, how)
    if calls is not None and shifting and how.correct_statistics:
        changes.append(CorrectStatistics(calls.fitted))
    integers = [] if quantization is None else _integers(quantization, calls, how)
    if calls is not None and how.tune_steps > 0:
        # ranges, tables, norms and biases move together
        tuned = Tune(
            calls.learned, how.tune_steps, how.seed, how.progress, calls.held_out, how.device
        )
        changes, integers = [*changes, *integers, tuned], []
    if any(KeepReference in step.after for step in changes):
        changes = [KeepReference(), *changes, ForgetReference()]
    passes += [*changes, *integers]
    return Pipeline(name, (*passes, RemoveUnused(keep_tied=True)), joint.artifact)


def _zeros(config: MagnitudePrunerConfig, how: CompressOptions) -> list[Pass]:
    return [AnnotatePruning(config, how.on_unmatched), PruneWeights()]


def _tables(
    joint: JointConfig,
    pairs: CalibrationCalls | None,
    loss_fn: LossFn | None,
    how: CompressOptions,
) -> list[Pass]:
    config = joint.palettization
    assert config is not None
    detect: list[Pass] = [DetectSparsity(config)] if config.looks_for_zeros else []
    return [
        *detect,
        AnnotatePalettization(config, how.on_unmatched, _held(joint, how)),
        FitPalettes(
            None if pairs is None else pairs.fitted,
            loss_fn,
            how.seed,
            how.progress,
            resources=how.resources,
            mmap_dir=how.mmap_dir,
        ),
        PalettizeWeights(seed=how.seed),
    ]


def _held(joint: JointConfig, how: CompressOptions) -> Held:
    """Which tables the target has that a compression is for."""
    artifact = joint.artifact
    if how.backend is None and artifact is None:
        return Held()
    lowering = dict(how.lowering or {}) if artifact is None else dict(artifact.lowering)
    backend = how.backend if artifact is None else artifact.backend
    assert backend is not None
    held = load_backend(backend).held(lowering)
    # a target without tables of its own expands them all
    return Held(held.vector, held.grouped or not held.index_bits)


def _integers(
    config: QuantizerConfig, calls: CalibrationCalls | None, how: CompressOptions
) -> list[Pass]:
    annotate = AnnotateQuantization(config, how.on_unmatched)
    if how.backend is not None:
        allowed = load_backend(how.backend).capabilities
        annotate = replace(
            annotate,
            fused=allowed.fused_activations,
            integer_results=allowed.integer_results,
            float_ops=allowed.float_ops,
        )
    seen = None if calls is None else calls.every
    migrated = [MigrateScales(seen)] if config.migrate_scales else []
    return [
        FoldPadding(),
        annotate,
        *migrated,
        *after_annotation(config, calls, how),
    ]


def after_annotation(
    config: QuantizerConfig, calls: CalibrationCalls | None, how: CompressOptions
) -> list[Pass]:
    """What follows where activations and weights are annotated and scales have migrated.

    Args:
        config: What becomes of which tensor.
        calls: Calibration inputs, or None.
        how: How it runs.
    """
    caches = config.kv_cache_quant_configs
    seen, fitted = (None, None) if calls is None else (calls.every, calls.fitted)
    return [
        CalibrateActivations(seen, how.on_unobserved, how.progress),
        FitIntegers(fitted, how.seed, how.progress, how.resources),
        FoldBatchNorm(),
        ConvertQuantization(),
        *([QuantizeCaches(tuple(caches))] if caches else []),
    ]
