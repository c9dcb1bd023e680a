"""Values of a run, up to a limit in memory and the rest in files that are mapped into it."""

from __future__ import annotations

import contextlib
import tempfile
import uuid
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.ir.mapped import is_mapped, map_tensor, release

__all__ = ["ActivationStore"]


class ActivationStore:
    """Takes values and gives back equal ones, of the same sizes and strides.

    Args:
        limit: Bytes of values that stay in memory; None keeps all there.
        folder: Where the files of the others go; None is the system's folder for such. A file has no
            name where the system allows that, and is gone with its last tensor in any case.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self.limit = limit
        self.resident = 0
        self._parent = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._readers: Counter[int] = Counter()  # by the address of a storage
        self._sizes: dict[int, int] = {}

    def hold(self, values: Any) -> None:
        """Count storages as the caller's own: they are in memory in any case."""
        for leaf in _tensors(values):
            place = leaf.untyped_storage().data_ptr()
            self._readers[place] += 1
            self._sizes[place] = 0

    def kept(self, value: Any) -> Any:
        """A value, in files where that would be too much for memory."""
        if self.limit is None:
            return value
        moved: dict[int, Tensor] = {}
        return pytree.tree_map(lambda leaf: self._kept(leaf, moved), value)

    def _kept(self, leaf: Any, moved: dict[int, Tensor]) -> Any:
        if not _is_plain(leaf) or is_mapped(leaf):
            return leaf
        assert self.limit is not None
        place, size = leaf.untyped_storage().data_ptr(), leaf.untyped_storage().nbytes()
        if place not in moved and (place in self._sizes or self.resident + size <= self.limit):
            if place not in self._sizes:
                self._sizes[place] = size
                self.resident += size
            self._readers[place] += 1
            return leaf
        if place not in moved:
            moved[place] = self._moved(leaf)
        storage = moved[place].untyped_storage()
        empty = torch.empty(0, dtype=leaf.dtype)
        return empty.set_(storage, leaf.storage_offset(), leaf.shape, leaf.stride())

    def _moved(self, leaf: Tensor) -> Tensor:
        """The whole storage of a tensor in a file: views keep their strides."""
        if self._folder is None:
            # a reference cycle would keep the folder for as long as the collector pleases
            self._folder = tempfile.TemporaryDirectory(prefix="graphopt-", dir=self._parent)
            weakref.finalize(self, self._folder.cleanup)
        whole = torch.empty(0, dtype=torch.uint8).set_(leaf.untyped_storage())
        path = Path(self._folder.name) / uuid.uuid4().hex
        whole.numpy().tofile(path)
        mapped = map_tensor(path, 0, whole.shape, torch.uint8)
        with contextlib.suppress(OSError):  # of systems where open files keep their names
            path.unlink()
        return mapped

    def dropped(self, values: Any) -> None:
        """Values that nobody reads any more."""
        if self.limit is None:
            return
        for leaf in _tensors(values):
            place = leaf.untyped_storage().data_ptr()
            if place not in self._sizes:
                continue
            self._readers[place] -= 1
            if not self._readers[place]:
                self.resident -= self._sizes.pop(place)
                del self._readers[place]

    def rest(self, values: Iterable[Any]) -> None:
        """Give back the memory that reads from files have taken."""
        if self.limit is not None:
            for leaf in _tensors(list(values)):
                if is_mapped(leaf):
                    release(leaf)


def _is_plain(leaf: Any) -> bool:
    return (
        type(leaf) is Tensor
        and leaf.layout == torch.strided
        and leaf.device.type == "cpu"
        and leaf.numel() > 0
    )


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if _is_plain(leaf)]
