"""The named pipelines, as values that can be changed, inspected and run anywhere.

>>> pipeline = pipelines.palettize(KMeansPalettizerConfig.presets.w4())
>>> pipeline = pipeline.insert_after("annotate-palettization", MyPass())
>>> program = pipeline.run(model, example_inputs, dump_dir="out/passes", verify=True)

A pipeline is a sequence of passes and itself a pass, so `torch.fx`'s own manager takes either form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from graphopt.compressors.joint import AnyConfig, joint_config, joint_passes
from graphopt.compressors.pipeline import Pipeline
from graphopt.config.joint import JointConfig
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.quantization import QuantizerConfig
from graphopt.errors import InputError
from graphopt.fitting.sensitivity import LossFn
from graphopt.passes import RaiseToVocabulary, RemoveUnused
from graphopt.passes.pass_manager import (
    PassManager,
    PassRecord,
    PassReport,
)
from graphopt.search.rdo import OptimizeRateDistortion, RDOConfig
from graphopt.specs import ExportBackend

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
    **options: Any,
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
    """
    whole = joint_config(config)
    if whole.quantization is not None:
        raise InputError("pipelines.palettize takes no quantization; use pipelines.joint")
    return Pipeline("palettize", joint_passes(whole, _listed(data), loss_fn, **options))


def quantize(
    config: QuantizerConfig | Mapping[str, Any] | str | Path | None = None,
    data: Sequence[Any] | None = None,
    *,
    backend: ExportBackend | str | None = None,
    on_unmatched: Literal["error", "warn"] = "error",
    on_unobserved: Literal["error", "skip"] = "error",
    progress: bool | None = None,
) -> Pipeline:
    """Weights and activations are quantized.

    Args:
        config: What becomes of what, or a mapping or YAML file of it; int8 everywhere by default.
        data: Calibration inputs of one call each, needed for the ranges of activations.
        backend: Target whose fusions decide where activations are rounded.
        on_unmatched: Whether a config key that matches nothing is an error or a warning.
        on_unobserved: "skip" leaves activations without a usable range in float.
        progress: Show bars; None shows them on a terminal.
    """
    whole = joint_config(QuantizerConfig() if config is None else config)
    if whole.palettization is not None:
        raise InputError("pipelines.quantize takes no palettization; use pipelines.joint")
    passes = joint_passes(
        whole,
        _listed(data),
        backend=backend,
        on_unmatched=on_unmatched,
        on_unobserved=on_unobserved,
        progress=progress,
    )
    return Pipeline("quantize", passes)


def joint(
    config: AnyConfig | Mapping[str, Any] | str | Path | None = None,
    data: Sequence[Any] | None = None,
    loss_fn: LossFn | None = None,
    **options: Any,
) -> Pipeline:
    """Palettized weights and quantized activations, in one pipeline: what `graphopt.compress` runs.

    Args:
        config: A `JointConfig`, one of its parts, or a mapping or YAML file of either; 4-bit tables
            and int8 activations by default.
        data: Calibration inputs of one call each; pairs (inputs, target) with `loss_fn`.
        loss_fn: `loss_fn(output, target)`; None needs no labels.
        options: As for `graphopt.compress`: `backend`, `correct_statistics`, `tune_steps`, `seed`,
            `progress`; and `on_unmatched`, `on_unobserved`, `fold_batch_norm`.
    """
    both = JointConfig(palettization=KMeansPalettizerConfig(), quantization=QuantizerConfig())
    whole = both if config is None else joint_config(config)
    return Pipeline("joint", joint_passes(whole, _listed(data), loss_fn, **options))


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
    """
    optimize = OptimizeRateDistortion(list(data), config, progress)
    return Pipeline("rdo", (RaiseToVocabulary(), optimize, RemoveUnused()))


def _listed(data: Sequence[Any] | None) -> list[Any] | None:
    return None if data is None else list(data)
