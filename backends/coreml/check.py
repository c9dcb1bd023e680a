"""Read Core ML packages back, evaluate them and compare."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.backends.base import (
    Verification,
    compare_outputs,
    expected_outputs,
    match_inputs,
    named_inputs,
)
from graphopt.backends.coreml.evaluate import evaluate, load_program
from graphopt.backends.quiet import quiet
from graphopt.errors import VerificationError
from graphopt.ir.program import Program

__all__ = ["check"]


def check(
    path: Path, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Verification:
    """Evaluate the package at `path` on these inputs and compare with `program` in PyTorch."""
    with quiet("coremltools"):
        loaded = load_program(path)
        known = loaded.functions["main"].inputs
        given = match_inputs(list(known), named_inputs(program, args, kwargs))
        feeds = {name: tensor.detach().cpu().numpy() for name, tensor in given.items()}
        result = evaluate(loaded, feeds)
    how = "read the package back, decompressed its weights and evaluated its MIL program"
    if result.unevaluated:
        notes = tuple(f"no rule for MIL op {op}" for op in result.unevaluated)
        partial = "read the package back and decompressed its weights only"
        return Verification(float("nan"), (), partial, False, notes, result.constexprs)
    expected = expected_outputs(program, args, kwargs)
    outputs = [torch.from_numpy(np.ascontiguousarray(value)) for value in result.outputs.values()]
    errors = compare_outputs(outputs, expected)
    notes = ()
    if platform.system() == "Darwin":
        worst = max(compare_outputs(_predict(path, feeds), expected), default=0.0)
        notes = (f"Core ML's own prediction differs by {worst:.3g}",)
        how += ", and predicted with Core ML"
    worst = max(errors, default=0.0)
    return Verification(worst, errors, how, True, notes, result.constexprs)


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
