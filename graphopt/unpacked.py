"""How much what others stored may become in memory: far more than is on disk is no data."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from graphopt.errors import InputError

__all__ = ["check_tensors", "check_unpacked"]

_SPARE = 2 << 30  # bytes that expanded or deflated values may have beyond what is stored
_DEEPEST = 100


def check_unpacked(source: str | Path | IO[bytes]) -> None:
    """Refuse zip bombs: `torch.save` and `numpy.savez` compress nothing, `savez_compressed` some.

    Raises:
        InputError: It is one.
    """
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
        stored = sum(member.compress_size for member in members)
        if sum(member.file_size for member in members) > stored + _SPARE:
            raise InputError("it unpacks to more than it has, as a zip bomb does")
    if not isinstance(source, str | Path):
        source.seek(0)


def check_tensors(value: Any, owner: str) -> None:
    """Containers of usual depth, and no tensors that repeat few numbers gigabytes of times.

    Raises:
        InputError: There are others.
    """
    level, more = [value], 0
    for _ in range(_DEEPEST):
        for tensor in level:
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                own = tensor.numel() * tensor.element_size()
                more += max(own - tensor.untyped_storage().nbytes(), 0)
        if more > _SPARE:
            raise InputError(f"{owner} holds tensors that are gigabytes larger than what is stored")
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list | tuple | set)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise InputError(f"{owner} is nested more than {_DEEPEST} levels deep")
