"""The passes of every flow, in order: the one place that says what runs when."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from graphopt.backends import load_backend
from graphopt.backends.raising import RaiseToVocabulary
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
from graphopt.run.calibration_data import data_list, inputs_of_pairs
from graphopt.schemes.forms import Held

__all__ = ["joint_pipeline"]


def joint_pipeline(
    name: str,
    joint: JointConfig,
    data: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    options: CompressOptions | None = None,
) -> Pipeline:
    """The pipeline of one config; every compressor, `compress` and the shell run what this builds.

    Weights are pruned and palettized first; then batch norms and biases take up what that has
    shifted; then tables are tuned; activations and the other weights are quantized last, so that
    their ranges are those of the compressed weights.

    Args:
        name: Its name for people.
        joint: What becomes of which tensor.
        data: Calibration inputs of one call each; pairs (inputs, target) with `loss_fn`.
        loss_fn: `loss_fn(output, target)`; None needs no labels.
        options: How it runs; the defaults of `CompressOptions` when None.

    Raises:
        InputError: The data hold no call, or no pairs where there is a `loss_fn`.
    """
    how = CompressOptions() if options is None else options
    given = data_list(data)
    inputs = given if given is None or loss_fn is None else inputs_of_pairs(given)
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
        changes += _tables(joint, given, loss_fn, how)
    passes += changes if inputs is None or not shifting else _compared(changes, inputs, how)
    if quantization is not None:
        passes += _integers(quantization, inputs, how)
    return Pipeline(name, (*passes, RemoveUnused(keep_tied=True)), joint.artifact)


def _zeros(config: MagnitudePrunerConfig, how: CompressOptions) -> list[Pass]:
    return [AnnotatePruning(config, how.on_unmatched), PruneWeights()]


def _tables(
    joint: JointConfig,
    data: list[Any] | None,
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
            data,
            loss_fn,
            how.seed,
            how.progress,
            executor=how.executor,
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


def _compared(changes: list[Pass], inputs: list[Any], how: CompressOptions) -> list[Pass]:
    """Changes to weights, and what is corrected against the graph before them."""
    corrections: list[Pass] = []
    if how.correct_statistics:
        corrections.append(CorrectStatistics(inputs))
    if how.tune_steps > 0:
        corrections.append(Tune(inputs, how.tune_steps, how.seed, how.progress))
    if not corrections:
        return changes
    return [KeepReference(), *changes, *corrections, ForgetReference()]


def _integers(
    config: QuantizerConfig, inputs: list[Any] | None, how: CompressOptions
) -> list[Pass]:
    fused, integer_results = None, False
    caches = config.kv_cache_quant_configs
    if how.backend is not None:
        allowed = load_backend(how.backend).capabilities
        fused, integer_results = allowed.fused_activations, allowed.integer_results
    migrated = [MigrateScales(inputs)] if config.migrate_scales else []
    return [
        AnnotateQuantization(config, how.on_unmatched, fused, integer_results),
        *migrated,
        CalibrateActivations(inputs, how.on_unobserved, how.progress),
        FitIntegers(inputs, how.seed, how.progress),
        FoldBatchNorm(),
        ConvertQuantization(),
        *([QuantizeCaches(tuple(caches))] if caches else []),
    ]
