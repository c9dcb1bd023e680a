"""The named pipelines, as values that can be changed, inspected and run anywhere.

>>> pipeline = pipelines.palettize(KMeansPalettizerConfig.presets.w4())
>>> pipeline = pipeline.insert_after("annotate-palettization", MyPass())
>>> program = pipeline.run(model, example_inputs, dump_dir="out/passes", verify=True)

A pipeline is a sequence of passes and itself a pass, so `torch.fx`'s own manager takes either form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from graphopt.backends.raising import RaiseToVocabulary
from graphopt.compressors.flow import joint_pipeline
from graphopt.compressors.joint import AnyConfig, joint_config
from graphopt.compressors.options import CompressKeywords, CompressOptions
from graphopt.compressors.pipeline import Pipeline
from graphopt.config.joint import JointConfig
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.quantization import QuantizerConfig
from graphopt.errors import InputError
from graphopt.extras import deferred
from graphopt.fitting.sensitivity import LossFn
from graphopt.passes import RemoveUnused
from graphopt.passes.pass_manager import PassManager, PassRecord, PassReport
from graphopt.search.rdo.config import RDOConfig

if TYPE_CHECKING:
    from graphopt.search.rdo import as_pass
else:
    as_pass = deferred("graphopt.search.rdo.as_pass")

__all__ = [
    "PassManager",
    "PassRecord",
    "PassReport",
    "Pipeline",
    "joint",
    "palettize",
    "quantize",
    "rdo",
]


def palettize(
    config: KMeansPalettizerConfig | Mapping[str, Any] | str | Path | None = None,
    data: Sequence[Any] | None = None,
    loss_fn: LossFn | None = None,
    **options: Unpack[CompressKeywords],
) -> Pipeline:
    """Weights become tables.

    Args:
        config: What becomes of which weight, or a mapping or YAML file of it; 4 bits everywhere by
            default.
        data: Calibration inputs of one call each (pairs with `loss_fn`), for the algorithms "skm" and
            "gptq" and for the correction of batch norms and biases.
        loss_fn: `loss_fn(output, target)`; None needs no labels.
        options: `correct_statistics`, `tune_steps`, `on_unmatched`, `fold_batch_norm`, `seed` and
            `progress`, as for `graphopt.compress`.

    Examples:
        >>> "palettize-weights" in palettize().names
        True
    """
    whole = joint_config(config)
    if whole.quantization is not None:
        raise InputError("pipelines.palettize takes no quantization; use pipelines.joint")
    return joint_pipeline(
        "palettize", whole, data, loss_fn, CompressOptions.of("pipelines.palettize", options)
    )


def quantize(
    config: QuantizerConfig | Mapping[str, Any] | str | Path | None = None,
    data: Sequence[Any] | None = None,
    **options: Unpack[CompressKeywords],
) -> Pipeline:
    """Weights and activations are quantized.

    Args:
        config: What becomes of what, or a mapping or YAML file of it; int8 everywhere by default.
        data: Calibration inputs of one call each, needed for the ranges of activations.
        options: `backend`, `tune_steps`, `on_unmatched`, `on_unobserved`, `seed` and `progress`, as for
            `graphopt.compress`.

    Examples:
        >>> "convert-quantization" in quantize(data=batches).names
        True
    """
    whole = joint_config(QuantizerConfig() if config is None else config)
    if whole.palettization is not None:
        raise InputError("pipelines.quantize takes no palettization; use pipelines.joint")
    return joint_pipeline(
        "quantize", whole, data, None, CompressOptions.of("pipelines.quantize", options)
    )


def joint(
    config: AnyConfig | Mapping[str, Any] | str | Path | None = None,
    data: Sequence[Any] | None = None,
    loss_fn: LossFn | None = None,
    **options: Unpack[CompressKeywords],
) -> Pipeline:
    """Palettized weights and quantized activations, in one pipeline: what `graphopt.compress` runs.

    Args:
        config: A `JointConfig`, one of its parts, or a mapping or YAML file of either; 4-bit tables
            and int8 activations by default.
        data: Calibration inputs of one call each; pairs (inputs, target) with `loss_fn`.
        loss_fn: `loss_fn(output, target)`; None needs no labels.
        options: As for `graphopt.compress`.

    Examples:
        >>> program = joint(data=batches).run(model, example)
        >>> len(program.report().palettized)
        2
    """
    both = JointConfig(palettization=KMeansPalettizerConfig(), quantization=QuantizerConfig())
    whole = both if config is None else joint_config(config)
    return joint_pipeline(
        "joint", whole, data, loss_fn, CompressOptions.of("pipelines.joint", options)
    )


def rdo(
    data: Sequence[Any],
    config: RDOConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    progress: bool | None = None,
) -> Pipeline:
    """Rate-distortion-optimised quantization (`graphopt.rdo`) as a pipeline.

    Args:
        data: Unlabelled calibration inputs of one call each.
        config: An `RDOConfig`, a mapping of its fields, or a YAML file.
        progress: Show bars; None shows them on a terminal.

    Examples:
        >>> rdo(batches, {"target_bits": 4}).names
        ('raise-to-vocabulary', 'optimize-rate-distortion', 'remove-unused')
    """
    optimize = as_pass.OptimizeRateDistortion(list(data), config, progress)
    return Pipeline("rdo", (RaiseToVocabulary(), optimize, RemoveUnused()))
