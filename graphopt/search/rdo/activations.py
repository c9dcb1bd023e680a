"""Rounded activations inside the optimisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.compressors.quantizer import Quantizer
from graphopt.errors import ConfigError
from graphopt.ir.program import Program
from graphopt.run.batches import Batch, run_call
from graphopt.search.mixed_precision.configs import joint_config_for
from graphopt.search.mixed_precision.layers import Layer, weights_of
from graphopt.specs import QuantizationSpec

__all__ = ["refuse_hidden", "with_rounded_activations"]


def with_rounded_activations(
    exact: Program, batches: Sequence[Batch], spec: QuantizationSpec, backend: str | None
) -> Program:
    """The exact program with its activations rounded; its constants keep their names.

    Raises:
        CalibrationError: Activations have no usable range.
    """
    config = joint_config_for({}, {}, spec).quantization
    assert config is not None
    config.migrate_scales = False
    quantizer = Quantizer(exact, config)
    prepared = quantizer.prepare(backend=backend)
    with quantizer.calibration_mode(), torch.no_grad():
        for batch in batches:
            run_call(prepared, batch)
    return Program(prepared, exact.example_args, exact.example_kwargs, exact.provenance)


def refuse_hidden(layers: Sequence[Layer], rounded: Program) -> None:
    """Refuse layers that a program with rounded activations computes together with their norms.

    Raises:
        ConfigError: There are some.
    """
    known = {weight.name for weight in weights_of(rounded.graph_module)}
    inside = [layer.name for layer in layers if layer.name not in known]
    if inside:
        raise ConfigError(
            f"fold_batchnorm=False with activations: norms behind {inside} are computed together with"
            " their layers where activations are rounded; set fold_batchnorm=True"
        )
