"""Check saved models and run them in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.backends.interface import as_array
from graphopt.backends.onnx.state import PAST, PRESENT
from graphopt.errors import VerificationError
from graphopt.extras import require

__all__ = ["check_model", "run_calls", "run_model", "session_of"]


def check_model(path: Path) -> None:
    """Check a saved model against the standard, shapes of all values included.

    Raises:
        VerificationError: It breaks a rule.
    """
    onnx = require("onnx", "onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise VerificationError(f"onnx.checker refuses {path.name}: {_line(error)}") from error


def session_of(path: Path, *, profile: Path | None = None) -> Any:
    """An `InferenceSession` on the CPU with the runtime's own defaults.

    Args:
        path: A saved model.
        profile: What the file of a profile's name begins with; None for no profile.

    Raises:
        VerificationError: The runtime does not load it.
    """
    ort = require("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise VerificationError(
            f"{path.name} does not load in ONNX Runtime: {_line(error)}"
        ) from error


def run_model(
    path: Path, inputs: Sequence[Tensor], state: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """Outputs of a saved model for one call.

    Args:
        path: An .onnx.
        inputs: Tensors in the order of the model's inputs.
        state: Values of `past_` inputs by their names.

    Returns:
        Outputs in the program's order, without new values of state.

    Raises:
        VerificationError: It does not load or run.
    """
    return run_calls(path, [inputs], state)[0][0]


def run_calls(
    path: Path, calls: Sequence[Sequence[Tensor]], state: Mapping[str, Tensor] | None = None
) -> list[tuple[list[Tensor], dict[str, Tensor]]]:
    """Outputs of calls of which each goes on from the state of the one before.

    Args:
        path: An .onnx.
        calls: Tensors of each in the order of the model's inputs.
        state: Values of `past_` inputs by their names, before the first one.

    Returns:
        Outputs in the program's order, and the values that the next call's `past_` inputs have.

    Raises:
        VerificationError: It does not load or run.
    """
    session, kept, found = session_of(path), dict(state or {}), []
    for inputs in calls:
        outputs, new = _run(session, path, inputs, kept)
        kept = {name: new.get(name, value) for name, value in kept.items()}
        found.append((outputs, kept))
    return found


def runner_of(
    path: Path, inputs: Sequence[Tensor], state: Mapping[str, Tensor]
) -> Callable[[], object]:
    """A function that computes one call in a session.

    Args:
        path: An .onnx.
        inputs: Tensors in the order of the model's inputs.
        state: Values of `past_` inputs by their names.
    """
    session = session_of(path)
    feeds = _feeds(session, path, inputs, state)
    return lambda: session.run(None, feeds)


def _feeds(
    session: Any, path: Path, inputs: Sequence[Tensor], state: Mapping[str, Tensor]
) -> dict[str, Any]:
    feeds = {name: as_array(tensor) for name, tensor in state.items()}
    places = [place for place in session.get_inputs() if place.name not in feeds]
    if len(places) != len(inputs):
        names = [place.name for place in places]
        raise VerificationError(f"{path.name} has inputs {names}, {len(inputs)} were given")
    for place, tensor in zip(places, inputs, strict=True):
        # a program in float64 is computed in float32
        narrow = place.type == "tensor(float)" and tensor.dtype is torch.float64
        feeds[place.name] = as_array(tensor.to(torch.float32) if narrow else tensor)
    return feeds


def _run(
    session: Any, path: Path, inputs: Sequence[Tensor], state: Mapping[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    feeds = _feeds(session, path, inputs, state)
    names = [out.name for out in session.get_outputs()]
    try:
        found = session.run(names, feeds)
    except Exception as error:
        raise VerificationError(
            f"{path.name} does not run in ONNX Runtime: {_line(error)}"
        ) from error
    values = {
        name: torch.from_numpy(np.array(value)) for name, value in zip(names, found, strict=True)
    }
    outputs = [value for name, value in values.items() if not name.startswith(PRESENT)]
    new = {
        f"{PAST}{name.removeprefix(PRESENT)}": value
        for name, value in values.items()
        if name.startswith(PRESENT)
    }
    return outputs, new


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
