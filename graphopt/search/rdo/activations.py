"""Rounded activations inside the optimisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.compressors.quantizer import Quantizer
from graphopt.config.quantization import ModuleQuantizerConfig, QuantizerConfig
from graphopt.ir.program import Program
from graphopt.run.batches import Batch, run_call
from graphopt.specs import QuantizationSpec

__all__ = ["quantize_activations", "with_rounded_activations"]


def _activation_config(spec: QuantizationSpec) -> QuantizerConfig:
    """Quantize all activations, and no weights."""
    slots: dict[Any, Any] = {"*": spec}
    return QuantizerConfig(
        global_config=ModuleQuantizerConfig(
            op_state_spec=None, op_input_spec=slots, op_output_spec=slots
        )
    )


def quantize_activations(
    program: CompressedProgram,
    data: Sequence[Any],
    spec: QuantizationSpec | None,
    backend: str | None,
    *,
    progress: bool | None = None,
) -> CompressedProgram:
    """A program with its activations quantized to the ranges that data give; None leaves it as it is.

    Raises:
        CalibrationError: Activations have no usable range.
    """
    if spec is None:
        return program
    quantizer = Quantizer(program, _activation_config(spec))
    quantizer.prepare(backend=backend)
    quantizer.calibrate(data, progress=progress)
    return quantizer.program()


def with_rounded_activations(
    exact: Program, batches: Sequence[Batch], spec: QuantizationSpec, backend: str | None
) -> Program:
    """The exact program with its activations rounded; its constants keep their names.

    Raises:
        CalibrationError: Activations have no usable range.
    """
    quantizer = Quantizer(exact, _activation_config(spec))
    prepared = quantizer.prepare(backend=backend)
    with quantizer.calibration_mode(), torch.no_grad():
        for batch in batches:
            run_call(prepared, batch)
    return Program(prepared, exact.example_args, exact.example_kwargs, exact.provenance)
