"""Sensitivities on disk: one float32 tensor per weight, under the weight's name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from graphopt.errors import InputError
from graphopt.files import replaced
from graphopt.numerics.finite import all_finite

__all__ = ["allocate", "load_sensitivities", "save_sensitivities"]


def save_sensitivities(path: str | Path, sensitivities: Mapping[str, Tensor]) -> Path:
    """Write sensitivities as safetensors; an existing file is replaced at once or not at all.

    Args:
        path: Where to.
        sensitivities: Name of the weight → float tensor of its shape.
    """
    target = Path(path)
    tensors = {name: value.detach().float().contiguous() for name, value in sensitivities.items()}
    with replaced(target) as temporary:
        save_file(tensors, temporary, metadata={"format": "graphopt.sensitivities"})
    return target


def load_sensitivities(path: str | Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Read sensitivities for the weights of a model.

    Args:
        path: A file of `save_sensitivities`, of this or another precision.
        shapes: Name → shape of the weights that need one.

    Returns:
        Name → float32 tensor, for the weights that the file holds.

    Raises:
        InputError: The file cannot be read, belongs to another model, or holds values that are
            negative or not finite.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: no safetensors file of sensitivities: {error}") from None
    sensitivities = {name: stored[name].float() for name in shapes if name in stored}
    if shapes and not sensitivities:
        raise InputError(
            f"{path} has no sensitivity for any weight to be palettized; it holds"
            f" {sorted(stored)[:5]}, the model {sorted(shapes)[:5]}"
        )
    for name, value in sensitivities.items():
        if value.shape != shapes[name]:
            raise InputError(
                f"{path}: {name} has shape {tuple(value.shape)}, the weight {tuple(shapes[name])}"
            )
        if not all_finite(value) or bool((value < 0).any()):
            raise InputError(f"{path}: {name} has values that are negative or not finite")
    return sensitivities


def allocate(name: str, shape: torch.Size, folder: Path | None) -> Tensor:
    """A float32 tensor of zeros in memory, or in a file that is mapped into it."""
    if folder is None:
        return torch.zeros(shape)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.f32"
    with path.open("wb") as file:
        file.truncate(4 * shape.numel())
    return torch.from_file(str(path), shared=True, size=shape.numel()).reshape(shape)
