"""The file that a table's sizes and a recipe's budget are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from graphopt.backends import ExportBackend, load_backend
from graphopt.errors import InputError
from graphopt.specs.artifact import ArtifactSpec
from graphopt.specs.dtypes import dtype_name, parse_dtype

__all__ = ["artifact_for"]

_PRECISION = "precision"


def artifact_for(
    backend: ExportBackend | str | None,
    precision: str | None = None,
    lowering: Mapping[str, Any] | None = None,
    float_dtype: torch.dtype | str | None = None,
) -> ArtifactSpec | None:
    """What will be saved, as options of an analysis or a recipe say it; None without a target.

    Args:
        backend: The target.
        precision: Float type of the artifact, for targets that have the option.
        lowering: Other options of the target.
        float_dtype: Float type whose sizes count; where the target has the option `precision`, and
            that is not given, it is meant.

    Raises:
        InputError: Options without a target, or two precisions.
        LoweringError: There is no such target or option, or an option cannot have that value.
        ConfigError: An option cannot be written to a file.
    """
    options = dict(lowering or {})
    if backend is None:
        if precision is not None or options:
            raise InputError("precision and lowering are options of a target: give backend, too")
        return None
    target = load_backend(backend)
    if precision is not None and options.setdefault(_PRECISION, precision) != precision:
        raise InputError(
            f"precision={precision!r} and lowering={options!r} contradict each other; give one"
        )
    if float_dtype is not None and any(
        field.name == _PRECISION for field in fields(target.options)
    ):
        half = dtype_name(parse_dtype(float_dtype)) == "float16"
        options.setdefault(_PRECISION, "float16" if half else "float32")
    target.storage(options, torch.float32)  # refuses what there is not
    return ArtifactSpec(backend=str(target.target), lowering=options)
