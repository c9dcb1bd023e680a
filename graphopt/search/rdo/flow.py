"""The pipeline that rate-distortion optimisation pauses: it searches where weights are annotated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.compressors.flow import joint_pipeline
from graphopt.compressors.options import CompressOptions
from graphopt.compressors.pipeline import Pipeline
from graphopt.passes import FoldBatchNorm
from graphopt.search.mixed_precision.candidates import Candidate
from graphopt.search.mixed_precision.configs import joint_config_for
from graphopt.search.rdo.config import RDOConfig

__all__ = ["pipeline_of"]


def pipeline_of(
    config: RDOConfig,
    choice: Mapping[str, Candidate],
    data: Sequence[Any] | None = None,
    *,
    progress: bool | None = None,
) -> Pipeline:
    """The passes by which every layer takes the form of its candidate, and activations are rounded.

    Those in front of the first annotation do not depend on the choice.

    Args:
        config: Options.
        choice: Name of the layer → its candidate.
        data: Inputs of one call each, for the ranges of activations.
        progress: Show a bar; None shows it on a terminal.
    """
    joint = joint_config_for(choice, {}, config.activations)
    if joint.quantization is not None:
        joint.quantization.migrate_scales = False  # layers were fitted to the scales as they are
    how = CompressOptions(
        backend=config.backend,
        correct_statistics=False,
        fold_batch_norm=config.fold_batchnorm,
        seed=config.seed,
        progress=progress,
    )
    pipeline = joint_pipeline("rdo", joint, data, options=how)
    if not config.fold_batchnorm and FoldBatchNorm.name in pipeline.names:
        pipeline = pipeline.without(FoldBatchNorm.name)
    return pipeline
