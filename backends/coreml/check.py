"""Read Core ML packages back and evaluate them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.backends.compute_plan import on_macos
from graphopt.backends.coreml.evaluate import ProgramRun, load_program
from graphopt.backends.coreml.states import decoded_state
from graphopt.backends.interface import as_array, match_inputs, named_inputs
from graphopt.backends.quiet import quiet
from graphopt.backends.verification import Evaluation, compare_outputs
from graphopt.errors import VerificationError
from graphopt.extras import require
from graphopt.ir.program import Program
from graphopt.ir.state import state_values
from graphopt.run.batches import Batch

__all__ = ["evaluate_calls", "evaluate_functions", "runner_of"]


def evaluate_calls(
    path: Path, program: Program, calls: Sequence[Batch], function: str = "main"
) -> list[Evaluation]:
    """Evaluate the package at `path`, each call going on from the state that the one before left.

    Args:
        path: A package.
        program: What it was made from.
        calls: Inputs of each call.
        function: Which of the package's functions.
    """
    how = "read the package back, decompressed its weights and evaluated its MIL program"
    initial = state_values(program.graph_module)
    with quiet("coremltools"):
        loaded = load_program(path)
        run = ProgramRun(loaded, function)
        known = dict(zip(run.state, initial.values(), strict=True))
        evaluations, feeds = [], []
        for call in calls:
            given = match_inputs(run.inputs, named_inputs(program, *call))
            feeds.append({name: as_array(tensor) for name, tensor in given.items()})
            result = run(feeds[-1])
            if result.unevaluated:
                notes = tuple(f"no rule for MIL op {op}" for op in result.unevaluated)
                partial = "read the package back and decompressed its weights only"
                return [Evaluation((), partial, False, notes, result.constexprs)] * len(calls)
            values = result.outputs.values()
            evaluations.append(
                Evaluation(
                    tuple(torch.from_numpy(np.ascontiguousarray(value)) for value in values),
                    how,
                    weights=result.constexprs,
                    state=tuple(
                        decoded_state(run.state[name], start) for name, start in known.items()
                    ),
                    state_type=torch.float16 if known else None,
                )
            )
    if on_macos():
        predicted = _predict(path, feeds, bool(known))
        worst = max(
            error
            for outputs, own in zip(predicted, evaluations, strict=True)
            for error in (*compare_outputs(outputs, own.outputs), 0.0)
        )
        notes = (f"Core ML's own prediction differs by {worst:.3g}",)
        how += ", and predicted with Core ML"
        evaluations = [replace(own, how=how, notes=notes) for own in evaluations]
    return evaluations


def evaluate_functions(
    path: Path, programs: Mapping[str, Program], calls: Sequence[tuple[str, Batch]]
) -> list[Evaluation]:
    """Evaluate calls of several functions of a package, which keep their state together.

    Args:
        path: A package with several functions.
        programs: What they were made from.
        calls: (function, inputs) of each.

    Raises:
        VerificationError: An op has no rule here.
    """
    how = "read the package back and evaluated its functions"
    evaluations = []
    with quiet("coremltools"):
        loaded = load_program(path)
        state: dict[str, Any] = {}
        runs = {name: ProgramRun(loaded, name, state) for name in programs}
        for name, call in calls:
            given = match_inputs(runs[name].inputs, named_inputs(programs[name], *call))
            result = runs[name]({key: as_array(x) for key, x in given.items()})
            if result.unevaluated:
                raise VerificationError(f"no rule for MIL ops {list(result.unevaluated)}")
            outputs = [torch.from_numpy(np.ascontiguousarray(x)) for x in result.outputs.values()]
            kind = torch.float16 if state else None
            evaluations.append(
                Evaluation(tuple(outputs), how, weights=result.constexprs, state_type=kind)
            )
    return evaluations


def runner_of(path: Path, program: Program, call: Batch) -> Callable[[], object]:
    """A function that predicts one call with Core ML, on macOS.

    Args:
        path: A package.
        program: What it was made from.
        call: Inputs.

    Raises:
        VerificationError: Core ML does not load the package.
    """
    with quiet("coremltools"):
        model = require("coremltools", "coreml").models.MLModel(str(path))
        try:
            model.get_compiled_model_path()
        except Exception as error:
            raise VerificationError(f"{path.name} does not load in Core ML: {error}") from error
    names = [each.name for each in model.get_spec().description.input]
    given = match_inputs(names, named_inputs(program, *call))
    feeds = {name: as_array(tensor) for name, tensor in given.items()}
    state = model.make_state() if program.state else None
    return lambda: model.predict(feeds, state)


def _predict(path: Path, feeds: Sequence[dict[str, Any]], stateful: bool) -> list[list[Tensor]]:
    """Outputs of Core ML itself, on macOS."""
    import coremltools

    model = coremltools.models.MLModel(str(path))
    given = {"state": model.make_state()} if stateful else {}
    names = [output.name for output in model.get_spec().description.output]
    results = []
    try:
        for inputs in feeds:
            outputs = model.predict(inputs, **given)
            results.append([torch.from_numpy(np.asarray(outputs[name])) for name in names])
    except Exception as error:
        raise VerificationError(f"Core ML cannot predict with {path.name}: {error}") from error
    return results
