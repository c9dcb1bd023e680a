"""Weights of a .pt2 file that stay in the file until they are read."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from graphopt.audited import read_exported
from graphopt.capture.export_errors import without_warnings
from graphopt.capture.quick_loading import quick_loading
from graphopt.exclusive import exclusive, patched
from graphopt.ir import torch_private
from graphopt.ir.mapped import map_tensor

__all__ = ["ALONE", "mapping_weights", "read_programs"]

ALONE = "model"  # what torch.export.save calls the one program of an archive
_MODELS = re.compile(r"(?:[^/]+/)?models/([^/]+)\.json")
_mapping: ContextVar[bool] = ContextVar("graphopt_map_weights", default=False)


@contextmanager
def mapping_weights(enabled: bool = True) -> Iterator[None]:
    """Let the weights of .pt2 files that are opened inside stay in these files.

    A file must stay as it is as long as its program lives, or be replaced by another of its name.
    """
    token = _mapping.set(enabled)
    try:
        yield
    finally:
        _mapping.reset(token)


def read_programs(path: Path) -> dict[str, ExportedProgram]:
    """Programs of a file by name, in its order, one of `torch.export.save` as "model".

    The caller has checked the file or trusts it; weights are mapped inside `mapping_weights`.
    """
    if not _mapping.get():
        return _read(path)
    package: Any = torch_private.archive_package

    def mapped(reader: Any, config: Any, folder: str) -> dict[str, Tensor]:
        return {
            meta.path_name: _flat(path, reader.archive_file, f"{folder}{meta.path_name}", meta)
            for meta in config.config.values()
            if not meta.use_pickle
        }

    with exclusive(), patched(package, _build_file_map=mapped):
        return _read(path)


def _read(path: Path) -> dict[str, ExportedProgram]:
    with zipfile.ZipFile(path) as archive:
        members = map(_MODELS.fullmatch, archive.namelist())
        names = [member[1] for member in members if member is not None]
    # torch warns of sizes that are in no value, such as those of inputs that nothing reads
    with exclusive(), quick_loading(), without_warnings("torch._export.serde"):
        if names in ([], [ALONE]):
            return {ALONE: read_exported(path)}
        loaded = torch_private.load_pt2(str(path)).exported_programs
    return {name: loaded[name] for name in names}


def _flat(path: Path, archive: Any, record: str, meta: Any) -> Tensor:
    """All elements of a stored tensor, 1-D."""
    package: Any = torch_private.archive_package
    dtype: torch.dtype = package.deserialize_scalar_type(meta.tensor_meta.dtype)
    size = archive.get_record_size(record)
    if size == 0:
        return torch.zeros(package.deserialize_size(meta.tensor_meta.sizes), dtype=dtype)
    flat = map_tensor(path, archive.get_record_offset(record), [size // dtype.itemsize], dtype)
    return flat.to(package.deserialize_device(meta.tensor_meta.device))
