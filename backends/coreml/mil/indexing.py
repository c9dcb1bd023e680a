"""Gathers, scatters, sorting, and what moves elements about."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from graphopt.backends.coreml.mil.values import Array, Rule, Values, tensor
from graphopt.errors import VerificationError

__all__ = ["INDEXING"]

_REDUCTIONS = {"mul": "prod", "max": "amax", "min": "amin"}


def _indices(v: Values, sizes: list[int]) -> Array:
    """Indices, checked: since iOS 17 negative ones and those beyond the end are undefined."""
    indices = np.asarray(v["indices"]).astype(np.int64)
    lowest = 0 if "validate_indices" in v else -np.asarray(sizes)
    if np.any(indices < lowest) or np.any(indices >= np.asarray(sizes)):
        raise VerificationError(f"an index is outside [0, {sizes})")
    return np.where(indices < 0, indices + np.asarray(sizes), indices)


def gather(v: Values) -> Array:
    """Slices along an axis; leading batch axes index themselves."""
    x, batch = np.asarray(v["x"]), int(v.get("batch_dims", 0))
    axis = int(v.get("axis", 0)) % x.ndim
    indices = _indices(v, [x.shape[axis]])
    if not batch:
        return np.take(x, indices, axis)
    lead = x.shape[:batch]
    rows = zip(
        x.reshape(-1, *x.shape[batch:]), indices.reshape(-1, *indices.shape[batch:]), strict=True
    )
    taken = np.stack([np.take(row, index, axis - batch) for row, index in rows])
    return taken.reshape(*lead, *taken.shape[1:])


def gather_along_axis(v: Values) -> Array:
    """One element for each index."""
    x = np.asarray(v["x"])
    axis = int(v.get("axis", 0))
    return np.take_along_axis(x, _indices(v, [x.shape[axis]]), axis)


def gather_nd(v: Values) -> Array:
    """Slices at the coordinates in the last axis of the indices."""
    x, batch = np.asarray(v["x"]), int(v.get("batch_dims", 0))
    depth = np.shape(v["indices"])[-1]
    indices = _indices(v, list(x.shape[batch : batch + depth]))
    grid = np.ogrid[tuple(slice(n) for n in indices.shape[:-1])]
    return x[tuple(grid[:batch]) + tuple(np.moveaxis(indices, -1, 0))]


def _scattered(data: Any, updates: Any, flat: Array, mode: str) -> Array:
    """Rows of a matrix updated in turn, `flat` being their numbers."""
    target, values = tensor(data), tensor(updates)
    rows = torch.from_numpy(flat).reshape(-1, 1).expand(-1, target.shape[1])
    if mode == "update":
        result = target.numpy().copy()
        result[flat] = values.numpy()
        return result
    if mode in ("sub", "div"):
        values = -values if mode == "sub" else 1 / values
        mode = "add" if mode == "sub" else "mul"
    if mode == "add":
        return target.scatter_add(0, rows, values).numpy()
    if mode not in _REDUCTIONS:
        raise VerificationError(f"scatter mode {mode}")
    return target.scatter_reduce(0, rows, values, _REDUCTIONS[mode]).numpy()


def scatter(v: Values) -> Array:
    """Slices along an axis take, or are combined with, the updates."""
    data, updates = np.asarray(v["data"]), np.asarray(v["updates"])
    axis = int(v.get("axis", 0)) % data.ndim
    indices = _indices(v, [data.shape[axis]])
    moved = np.moveaxis(data, axis, 0)
    updates = np.moveaxis(updates, axis, 0)
    width = int(np.prod(moved.shape[1:]))
    result = _scattered(
        moved.reshape(-1, width), updates.reshape(-1, width), indices.reshape(-1), _mode(v)
    )
    return np.moveaxis(result.reshape(moved.shape), 0, axis)


def scatter_along_axis(v: Values) -> Array:
    """One element for each index."""
    data, updates = np.asarray(v["data"]), np.asarray(v["updates"])
    axis = int(v.get("axis", 0)) % data.ndim
    indices = _indices(v, [data.shape[axis]])
    places = list(np.broadcast_arrays(*np.ogrid[tuple(slice(n) for n in indices.shape)]))
    places[axis] = indices
    return _at_places(data, updates, tuple(places), _mode(v))


def scatter_nd(v: Values) -> Array:
    """Slices at the coordinates in the last axis of the indices."""
    data, updates = np.asarray(v["data"]), np.asarray(v["updates"])
    depth = np.shape(v["indices"])[-1]
    places = tuple(np.moveaxis(_indices(v, list(data.shape[:depth])), -1, 0))
    return _at_places(data, updates, places, _mode(v))


def _mode(v: Values) -> str:
    return str(v.get("mode", "add"))


def _at_places(data: Array, updates: Array, places: tuple[Array, ...], mode: str) -> Array:
    lead = data.shape[: len(places)]
    width = int(np.prod(data.shape[len(places) :]))
    flat = np.ravel_multi_index(places, lead).reshape(-1)
    result = _scattered(data.reshape(-1, width), updates.reshape(-1, width), flat, mode)
    return result.reshape(data.shape)


def one_hot(v: Values) -> Array:
    """A new axis that is on at the index."""
    size, on, off = int(v["one_hot_vector_size"]), v.get("on_value", 1), v.get("off_value", 0)
    hit = np.asarray(v["indices"])[..., None] == np.arange(size)
    return np.moveaxis(np.where(hit, on, off), -1, int(v.get("axis", -1)))


def crop(v: Values) -> Array:
    """The middle of the last two axes."""
    (top, bottom), (left, right) = (
        [int(i) for i in v[name]] for name in ("crop_height", "crop_width")
    )
    h, w = v["x"].shape[-2:]
    return np.asarray(v["x"])[..., top : h - bottom, left : w - right]


def argsort(v: Values) -> Array:
    """Equal elements keep their order."""
    order = tensor(v["x"]).sort(
        dim=int(v.get("axis", -1)), descending=not v.get("ascending", False), stable=True
    )
    return order.indices.numpy()


def topk(v: Values) -> Array | tuple[Array, ...]:
    """The first `k` of the sorted elements, and where they were."""
    x, axis = np.asarray(v["x"]), int(v.get("axis", -1))
    order = np.take(argsort(v), np.arange(int(v.get("k", 1))), axis)
    values = np.take_along_axis(x, order, axis)
    return (values, order) if v.get("return_indices", True) else values


def cumsum(v: Values) -> Array:
    """Running sums, of what comes before (or behind) an element or with it."""
    x, axis = tensor(v["x"]), int(v.get("axis", 0))
    x = x.flip(axis) if v.get("reverse") else x
    total = x.cumsum(axis).to(x.dtype)
    if v.get("exclusive"):
        total = total - x
    return (total.flip(axis) if v.get("reverse") else total).numpy()


def split(v: Values) -> tuple[Array, ...]:
    """Parts along an axis, of equal or of given sizes."""
    x, axis = np.asarray(v["x"]), int(v["axis"])
    if v.get("split_sizes") is None:
        return tuple(np.split(x, int(v["num_splits"]), axis))
    ends = np.cumsum([int(size) for size in np.atleast_1d(v["split_sizes"])])
    return tuple(np.split(x, ends[:-1], axis))


def sliding_windows(v: Values) -> Array:
    """Windows along an axis; their elements are the axis behind it."""
    x = tensor(v["x"])
    axis = int(v["axis"]) % x.dim()
    windows = x.unfold(axis, int(v["size"]), int(v.get("stride", 1)))
    return windows.movedim(-1, axis + 1).numpy()


def depth_to_space(v: Values) -> Array:
    """Blocks come from the channel axis, outermost there."""
    x, b = tensor(v["x"]), int(v["block_size"])
    n, c, h, w = x.shape
    blocks = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, c // b**2, h * b, w * b).numpy()


def space_to_depth(v: Values) -> Array:
    """Blocks go to the channel axis, outermost there."""
    x, b = tensor(v["x"]), int(v["block_size"])
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, c * b**2, h // b, w // b).numpy()


def space_to_batch(v: Values) -> Array:
    """Blocks of the padded image go to the batch axis, outermost there."""
    (top, bottom), (left, right) = np.asarray(v["paddings"]).tolist()
    x = F.pad(tensor(v["x"]), (left, right, top, bottom))
    (p, q), (n, c, h, w) = np.asarray(v["block_shape"]).tolist(), x.shape
    blocks = x.reshape(n, c, h // p, p, w // q, q).permute(3, 5, 0, 1, 2, 4)
    return blocks.reshape(n * p * q, c, h // p, w // q).numpy()


def batch_to_space(v: Values) -> Array:
    """Blocks come from the batch axis; the edges are cropped."""
    x, (p, q) = tensor(v["x"]), np.asarray(v["block_shape"]).tolist()
    (top, bottom), (left, right) = np.asarray(v["crops"]).tolist()
    n, c, h, w = x.shape
    n //= p * q
    full = x.reshape(p, q, n, c, h, w).permute(2, 3, 4, 0, 5, 1).reshape(n, c, h * p, w * q)
    return full[..., top : h * p - bottom, left : w * q - right].numpy()


def reverse_sequence(v: Values) -> Array:
    """The first elements of each sequence, as many as its length, in reverse."""
    x = np.array(v["x"])
    batch, axis = int(v.get("batch_axis", 0)), int(v.get("seq_axis", 0))
    rows = np.moveaxis(x, (batch, axis), (0, 1))
    for row, length in zip(rows, np.asarray(v["lengths"]).tolist(), strict=True):
        row[:length] = row[:length][::-1].copy()
    return x


INDEXING: dict[str, Rule] = {
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
    "one_hot": one_hot,
    "crop": crop,
    "argsort": argsort,
    "topk": topk,
    "cumsum": cumsum,
    "split": split,
    "sliding_windows": sliding_windows,
    "depth_to_space": depth_to_space,
    "space_to_depth": space_to_depth,
    "space_to_batch": space_to_batch,
    "batch_to_space": batch_to_space,
    "reverse_sequence": reverse_sequence,
    "pixel_shuffle": lambda v: F.pixel_shuffle(tensor(v["x"]), int(v["upscale_factor"])).numpy(),
    "pixel_unshuffle": lambda v: F.pixel_unshuffle(
        tensor(v["x"]), int(v["downscale_factor"])
    ).numpy(),
}
