"""Tensors whose bytes lie in files: they are read when they are used, and take memory only then."""

from __future__ import annotations

import mmap
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graphopt.audited import Limits, parse_json
from graphopt.errors import InputError

__all__ = ["is_mapped", "kept_in_files", "map_tensor", "mapped_weights", "moved_to", "release"]

_Stored = TypeVar("_Stored")
_PAGE_OUT = 21  # MADV_PAGEOUT of Linux: give the memory back, whatever was written stays
_MOST_HEADER = 100 << 20  # bytes, as of the format's own reader
_HEADER = Limits(characters=_MOST_HEADER, depth=10, values=10_000_000)
_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_LEAST = 1 << 16  # bytes; less is no burden
_maps: weakref.WeakValueDictionary[int, _Map] = weakref.WeakValueDictionary()


class _Map(mmap.mmap):
    """A mapping that can be referred to weakly."""


def map_tensor(path: str | Path, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor over a part of a file, which writes to it do not reach.

    Args:
        path: The file; as long as the tensor lives it must stay as it is, or be replaced by another
            file of its name.
        offset: Of the first byte, a multiple of the type's size.
        shape: Its sizes, row-major; at least one element.
        dtype: Of the elements.
    """
    count = torch.Size(shape).numel()
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = offset - start + count * dtype.itemsize
    with Path(path).open("rb") as file:
        mapping = _Map(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
    flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset - start)
    _maps[flat.untyped_storage().data_ptr()] = mapping
    return flat.reshape(list(shape))


def mapped_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, which stay in the file until they are read.

    For models larger than memory: a module that was built on the meta device takes them.

    >>> from safetensors.torch import save_file
    >>> save_file({"weight": torch.ones(3, 4), "bias": torch.zeros(3)}, "weights.safetensors")
    >>> with torch.device("meta"):
    ...     model = torch.nn.Linear(4, 3)
    >>> weights = graphopt.mapped_weights("weights.safetensors")
    >>> model.load_state_dict(weights, assign=True)
    <All keys matched successfully>
    >>> model(torch.ones(4)).tolist()
    [4.0, 4.0, 4.0]

    Args:
        path: The file; it must stay as it is as long as the tensors live.

    Raises:
        InputError: It is no such file, or holds a type that torch has not.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MOST_HEADER, path.stat().st_size):
                raise InputError(f"{path} is no .safetensors file")
            header = parse_json(file.read(length).decode(), str(path), _HEADER)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as .safetensors: {error}") from None
    if not isinstance(header, dict):
        raise InputError(f"{path} is no .safetensors file")
    header.pop("__metadata__", None)
    return {name: _mapped(path, 8 + length, name, entry) for name, entry in header.items()}


def _mapped(path: Path, begin: int, name: str, entry: Any) -> Tensor:
    try:
        dtype, shape = _TYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
        first, last = entry["data_offsets"]
        wanted = torch.Size(shape).numel() * dtype.itemsize
        if min(shape, default=0) < 0 or last - first != wanted or first < 0:
            raise InputError(f"{path}: {name}: its bytes do not fit its shape")
        if begin + last > path.stat().st_size:
            raise InputError(f"{path}: {name} lies beyond the end of the file")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {name}: {entry!r} is no tensor of torch: {error}") from None
    if wanted == 0:
        return torch.empty(shape, dtype=dtype)
    return map_tensor(path, begin + first, shape, dtype)


def _map_of(tensor: Tensor) -> _Map | None:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.device.type != "cpu":
        return None
    return _maps.get(tensor.untyped_storage().data_ptr())


def is_mapped(tensor: Tensor) -> bool:
    """Whether its bytes lie in a file."""
    return _map_of(tensor) is not None


def release(*tensors: Tensor) -> None:
    """Give back the memory that reads of mapped tensors have taken; of all of them if none is named.

    Values stay; the next read takes them from the file again. Where the system knows no such advice,
    it keeps the memory until it needs it.
    """
    for mapping in [_map_of(tensor) for tensor in tensors] if tensors else list(_maps.values()):
        if mapping is not None:
            try:
                mapping.madvise(_PAGE_OUT)
            except (AttributeError, OSError, ValueError):
                return


def moved_to(folder: Path, tensor: Tensor) -> Tensor:
    """The tensor with its bytes in a new file of a folder; small ones stay where they are."""
    if tensor.numel() * tensor.element_size() < _LEAST or is_mapped(tensor):
        return tensor
    path = folder / f"{uuid.uuid4().hex}.bin"
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    flat.view(torch.uint8).numpy().tofile(path)
    return map_tensor(path, 0, tensor.shape, tensor.dtype)


def kept_in_files(stored: _Stored, folder: Path | None) -> _Stored:
    """A frozen value with the tensors among its fields moved to a folder; itself without one."""
    if folder is None:
        return stored
    moved: dict[str, Any] = {
        each.name: moved_to(folder, value)
        for each in fields(stored)  # type: ignore[arg-type]
        if isinstance(value := getattr(stored, each.name), Tensor)
    }
    return replace(stored, **moved)  # type: ignore[type-var]
