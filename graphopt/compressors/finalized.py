"""What becomes of a compressed program at the end: whose ops it holds, and where its tensors lie."""

from __future__ import annotations

import warnings
from collections import defaultdict
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graphopt.backends import load_backend
from graphopt.backends.lowering import convert_for
from graphopt.backends.registry import NEUTRAL, ExportBackend, target_of
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.errors import ConfigWarning, InputError
from graphopt.files import replaced
from graphopt.ir.captured_module import CapturedModule, holder_of
from graphopt.passes import DecodeWeights
from graphopt.passes.pass_manager import run_passes

__all__ = ["Weights", "finalized"]

Weights = Literal["stored", "dense"]


def finalized(
    program: CompressedProgram,
    backend: ExportBackend | str,
    weights: Weights = "stored",
    mmap_dir: str | Path | None = None,
) -> CapturedModule:
    """A module with the ops of a backend.

    Args:
        program: What it computes.
        backend: Whose ops it holds.
        weights: "stored" keeps codes and tables; "dense" has the floats that they stand for, which
            is faster to evaluate and as large as the model was.
        mmap_dir: An empty or new folder that the tensors move to, one file per module; the module
            reads them from there as long as it lives.

    Raises:
        InputError: Dense weights for another target than Torch, or the folder holds something.
        LoweringError: The backend cannot hold the program.
    """
    if weights not in ("stored", "dense"):
        raise InputError(f"weights must be 'stored' or 'dense', got {weights!r}")
    if weights == "dense" and target_of(backend) is not NEUTRAL:
        raise InputError(f"dense weights are for evaluation in PyTorch; {backend} stores codes")
    folder = None if mmap_dir is None else _empty(Path(mmap_dir))
    module = convert_for(program, backend)
    for remark in load_backend(backend).remarks_on(module):
        warnings.warn(remark, ConfigWarning, stacklevel=3)
    if weights == "dense":
        run_passes(module, [DecodeWeights()])
    if folder is not None:
        _move(module, folder)
    return module


def _empty(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"mmap_dir={folder} is no folder")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"mmap_dir={folder} is not empty; give a folder of its own")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _move(module: CapturedModule, folder: Path) -> None:
    """Let the tensors of a module be views of files."""
    by_module: dict[str, dict[str, Tensor]] = defaultdict(dict)
    seen: dict[int, str] = {}
    tied: dict[str, str] = {}
    for path, tensor in module.state_dict().items():
        first = seen.setdefault(tensor.data_ptr(), path) if tensor.numel() else path
        if first != path:
            tied[path] = first
            continue
        by_module[path.rpartition(".")[0]][path] = tensor
    for place, tensors in enumerate(by_module.values()):
        file = folder / f"{place:05d}.safetensors"
        with replaced(file) as temporary:
            save_file({path: tensor.contiguous() for path, tensor in tensors.items()}, temporary)
        for path, tensor in load_file(file).items():
            _put(module, path, tensor)
    for path, first in tied.items():
        _put(module, path, module.state_dict()[first])


def _put(module: CapturedModule, path: str, value: Tensor) -> None:
    holder, name = holder_of(module, path)
    if name in holder._parameters:
        trains = value.is_floating_point() and getattr(holder, name).requires_grad
        with torch.no_grad():
            holder._parameters[name] = nn.Parameter(value, requires_grad=trains)
    else:
        holder._buffers[name] = value
