"""Read Core ML packages back and evaluate them."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.backends.coreml.evaluate import evaluate, load_program
from graphopt.backends.interface import match_inputs, named_inputs
from graphopt.backends.quiet import quiet
from graphopt.backends.verification import Evaluation, compare_outputs
from graphopt.errors import VerificationError
from graphopt.ir.program import Program
from graphopt.run.batches import Batch

__all__ = ["evaluate_package"]


def evaluate_package(path: Path, program: Program, call: Batch) -> Evaluation:
    """Evaluate the package at `path` on the inputs of one call of `program`."""
    with quiet("coremltools"):
        loaded = load_program(path)
        known = loaded.functions["main"].inputs
        given = match_inputs(list(known), named_inputs(program, *call))
        feeds = {name: tensor.detach().cpu().numpy() for name, tensor in given.items()}
        result = evaluate(loaded, feeds)
    how = "read the package back, decompressed its weights and evaluated its MIL program"
    if result.unevaluated:
        notes = tuple(f"no rule for MIL op {op}" for op in result.unevaluated)
        partial = "read the package back and decompressed its weights only"
        return Evaluation((), partial, False, notes, result.constexprs)
    values = result.outputs.values()
    outputs = tuple(torch.from_numpy(np.ascontiguousarray(value)) for value in values)
    notes = ()
    if platform.system() == "Darwin":
        worst = max(compare_outputs(_predict(path, feeds), outputs), default=0.0)
        notes = (f"Core ML's own prediction differs by {worst:.3g}",)
        how += ", and predicted with Core ML"
    return Evaluation(outputs, how, True, notes, result.constexprs)


def _predict(path: Path, feeds: dict[str, Any]) -> list[Tensor]:
    """Outputs of Core ML itself, on macOS."""
    import coremltools

    model = coremltools.models.MLModel(str(path))
    try:
        outputs = model.predict(feeds)
    except Exception as error:
        raise VerificationError(f"Core ML cannot predict with {path.name}: {error}") from error
    names = [output.name for output in model.get_spec().description.output]
    return [torch.from_numpy(np.asarray(outputs[name])) for name in names]
