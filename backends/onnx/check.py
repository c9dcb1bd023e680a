"""Check saved models and run them in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.backends.onnx.state import PRESENT
from graphopt.errors import VerificationError
from graphopt.extras import require

__all__ = ["check_model", "run_model", "session_of"]


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
    session = session_of(path)
    feeds = {name: tensor.numpy() for name, tensor in (state or {}).items()}
    places = [place for place in session.get_inputs() if place.name not in feeds]
    if len(places) != len(inputs):
        names = [place.name for place in places]
        raise VerificationError(f"{path.name} has inputs {names}, {len(inputs)} were given")
    for place, tensor in zip(places, inputs, strict=True):
        # a program in float64 is computed in float32
        narrow = place.type == "tensor(float)" and tensor.dtype is torch.float64
        held = tensor.detach().cpu().contiguous()
        feeds[place.name] = (held.to(torch.float32) if narrow else held).numpy()
    given = [out.name for out in session.get_outputs() if not out.name.startswith(PRESENT)]
    try:
        found = session.run(given, feeds)
    except Exception as error:
        raise VerificationError(
            f"{path.name} does not run in ONNX Runtime: {_line(error)}"
        ) from error
    return [torch.from_numpy(np.array(value)) for value in found]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
