"""Gathers and scatters at any places, in gathers and scatters along one axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "embedding_of_scalar",
    "gather_of_any_shape",
    "index",
    "index_add",
    "index_copy",
    "index_fill",
    "index_put",
    "index_reduce",
    "index_select",
    "masked_scatter",
    "put",
    "repeat_interleave",
    "repeated_places",
    "scatter_add_of_any_shape",
    "scatter_combined",
    "scatter_of_any_shape",
    "scatter_reduce",
    "scatter_value",
    "take",
    "wrapped",
]


def embedding_of_scalar(weight: Tensor, place: Tensor, *_: Any) -> Any:
    """The row of one index without axes; else left alone."""
    if place.dim():
        return NotImplemented
    return torch.embedding(weight, place.reshape(1)).squeeze(0)


def wrapped(places: Tensor, size: int) -> Tensor:
    """Indices with the negative ones counted from the end."""
    places = places.to(torch.int64)
    return torch.where(places < 0, places + size, places)


class _Places:
    """Indexed axes of a tensor in front, flattened, and the rows that an index picks."""

    def __init__(self, x: Tensor, indices: Sequence[Tensor | None]) -> None:
        self.axes = [axis for axis, index in enumerate(indices) if index is not None]
        given = torch.broadcast_tensors(*[index for index in indices if index is not None])
        self.rest = [axis for axis in range(x.dim()) if axis not in self.axes]
        self.shape = list(given[0].shape)
        self.sizes = [x.shape[axis] for axis in self.axes]
        self.kept = [x.shape[axis] for axis in self.rest]
        together = self.axes == list(range(self.axes[0], self.axes[0] + len(self.axes)))
        # axes that stand apart give an index whose axes come first
        self.front = self.axes[0] if together else 0
        rows = wrapped(given[0], self.sizes[0])
        for index, size in zip(given[1:], self.sizes[1:], strict=True):
            rows = rows * size + wrapped(index, size)
        self.rows = rows.reshape(-1)

    def matrix(self, x: Tensor) -> Tensor:
        """The tensor with a row for each place."""
        moved = x.permute([*self.axes, *self.rest])
        return moved.reshape(math.prod(self.sizes), math.prod(self.kept))

    def whole(self, matrix: Tensor) -> Tensor:
        """The tensor of a matrix of places."""
        order = [*self.axes, *self.rest]
        back = [order.index(axis) for axis in range(len(order))]
        return matrix.reshape([*self.sizes, *self.kept]).permute(back)

    def picked(self, rows: Tensor) -> Tensor:
        """Picked rows in the shape of `x[indices]`."""
        n = len(self.shape)
        full = rows.reshape([*self.shape, *self.kept])
        order = [*range(n, n + self.front), *range(n), *range(n + self.front, full.dim())]
        return full.permute(order)

    def updates(self, values: Tensor) -> Tensor:
        """Values that broadcast to `x[indices]`, as rows."""
        n = len(self.shape)
        wanted = [*self.kept[: self.front], *self.shape, *self.kept[self.front :]]
        full = values.expand(wanted)
        order = [*range(self.front, self.front + n), *range(self.front)]
        full = full.permute([*order, *range(self.front + n, full.dim())])
        return full.reshape(math.prod(self.shape), math.prod(self.kept))


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def index(x: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """`x[indices]`; left alone where booleans pick."""
    if any(_is_mask(given) for given in indices):
        return NotImplemented
    places = _Places(x, indices)
    if not places.shape:
        shape = [*places.kept]
        return places.matrix(x).index_select(0, places.rows).reshape(shape)
    return places.picked(places.matrix(x).index_select(0, places.rows))


def index_put(
    x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> Any:
    """`x[indices] = values`, or added; left alone where a mask picks beside other indices."""
    given = [index for index in indices if index is not None]
    if any(_is_mask(index) for index in given):
        return _masked_put(x, indices, values, accumulate)
    places = _Places(x, indices)
    if places.rows.numel() == 0 or x.numel() == 0:
        return x.clone()
    matrix = places.matrix(x)
    rows = places.rows.reshape(-1, 1).expand(-1, matrix.shape[1])
    updates = places.updates(values.to(x.dtype))
    put = torch.scatter_add if accumulate else torch.scatter
    return places.whole(put(matrix, 0, rows, updates))


def _masked_put(x: Tensor, indices: Sequence[Any], values: Tensor, accumulate: bool) -> Any:
    if len(indices) != 1:
        return NotImplemented
    mask = indices[0].to(torch.bool)
    kept = list(x.shape[mask.dim() :])
    values = values.to(x.dtype)
    values = values.reshape([1] * (len(kept) + 1 - values.dim()) + list(values.shape))
    if isinstance(values.shape[0], int) and values.shape[0] == 1:
        value = values.reshape([1] * mask.dim() + list(values.shape[1:]))
    else:
        rows = values.expand([values.shape[0], *kept]).index_select(0, _turns(mask, values))
        value = rows.reshape([*mask.shape, *kept])
    mask = mask.reshape([*mask.shape, *[1] * len(kept)])
    return torch.where(mask, x + value if accumulate else value, x)


def _turns(mask: Tensor, source: Tensor) -> Tensor:
    """For each element of a mask, the row of the source that is next where it is true."""
    return torch.clamp(mask.reshape(-1).to(torch.int64).cumsum(0) - 1, 0, source.shape[0] - 1)


def index_select(x: Tensor, dim: int, places: Tensor) -> Any:
    """Of a scalar or of booleans; else left alone."""
    if not x.dim():
        return x.clone()
    if x.dtype is torch.bool:
        return x.to(torch.int32).index_select(dim, places).to(torch.bool)
    return NotImplemented


def _fits(x: Tensor, dim: int, places: Tensor) -> bool:
    """Whether an index has the sizes of the tensor along the other axes."""
    dim = dim % max(x.dim(), 1)
    sizes = zip(x.shape, places.shape, strict=True)
    return all(a == b for axis, (a, b) in enumerate(sizes) if axis != dim)


def gather_of_any_shape(x: Tensor, dim: int, places: Tensor, *, sparse_grad: bool = False) -> Any:
    """Of a scalar, booleans, or by an index that is shorter elsewhere; else left alone."""
    if x.dtype is torch.bool:
        return torch.gather(x.to(torch.int32), dim, places).to(torch.bool)
    if not x.dim():
        return x.clone() if not places.dim() else x.reshape(1).expand(places.shape).clone()
    if not places.dim():
        return torch.gather(x, dim, places.reshape(1)).reshape([])
    if _fits(x, dim, places):
        return NotImplemented
    for axis, size in enumerate(places.shape):
        if axis != dim % x.dim():
            x = x.narrow(axis, 0, size)
    return torch.gather(x, dim, places)


def _flat(x: Tensor, dim: int, places: Tensor) -> Tensor:
    """Positions in the flattened tensor of what an index along an axis picks."""
    dim, flat, step = dim % x.dim(), torch.zeros([1] * x.dim(), dtype=torch.int64), 1
    for axis in reversed(range(x.dim())):
        if axis == dim:
            along = places.to(torch.int64)
        else:
            shape = [-1 if other == axis else 1 for other in range(x.dim())]
            along = torch.arange(places.shape[axis]).reshape(shape)
        flat = flat + along * step
        step *= x.shape[axis]
    return flat.expand(places.shape).reshape(-1)


def _cut(source: Tensor, shape: Sequence[int]) -> Tensor:
    for axis, size in enumerate(shape):
        source = source.narrow(axis, 0, size) if source.shape[axis] != size else source
    return source


def scatter_of_any_shape(x: Tensor, dim: int, places: Tensor, source: Tensor) -> Any:
    """With an index that is shorter than the tensor or the source; else left alone."""
    return _scattered(x, dim, places, source, "update")


def scatter_add_of_any_shape(x: Tensor, dim: int, places: Tensor, source: Tensor) -> Any:
    """With an index that is shorter than the tensor or the source; else left alone."""
    return _scattered(x, dim, places, source, "sum")


def scatter_value(x: Tensor, dim: int, places: Tensor, value: Any) -> Tensor:
    """One value at every place."""
    source = torch.full(places.shape, value, dtype=x.dtype)
    return torch.scatter(x, dim, places, source)


def scatter_combined(x: Tensor, dim: int, places: Tensor, source: Any, *, reduce: str) -> Tensor:
    """Values, or one number, added to or multiplied with what is there."""
    if not isinstance(source, Tensor):
        source = torch.full(list(places.shape), source, dtype=x.dtype)
    if reduce == "add":
        return torch.scatter_add(x, dim, places, source)
    return torch.scatter_reduce(x, dim, places, source, "prod")


def _scattered(x: Tensor, dim: int, places: Tensor, source: Tensor, how: str) -> Any:
    if x.dtype is torch.bool:
        whole = torch.int32
        return torch.scatter(x.to(whole), dim, places, source.to(whole)).to(torch.bool)
    if not x.dim():
        flat = _scattered(x.reshape(1), 0, places.reshape(-1), source.reshape(-1), how)
        if flat is NotImplemented:
            flat = _combine(x.reshape(1), places.reshape(-1), source.reshape(-1), how)
        return flat.reshape([])
    if _fits(x, dim, places) and source.shape == places.shape:
        return NotImplemented
    source = _cut(source, places.shape).reshape(-1).to(x.dtype)
    return _combine(x.reshape(-1), _flat(x, dim, places), source, how).reshape(x.shape)


def _combine(x: Tensor, places: Tensor, source: Tensor, how: str) -> Tensor:
    if how == "update":
        return torch.scatter(x, 0, places, source)
    if how == "sum":
        return torch.scatter_add(x, 0, places, source)
    return torch.scatter_reduce(x, 0, places, source, how)


_NEUTRAL = {"sum": 0.0, "prod": 1.0, "amax": -math.inf, "amin": math.inf}


def scatter_reduce(
    x: Tensor, dim: int, places: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    """Means, and without what is there; left alone where it only combines."""
    if not x.dim():
        return torch.scatter_reduce(
            x.reshape(1),
            0,
            places.reshape(-1),
            source.reshape(-1),
            reduce,
            include_self=include_self,
        ).reshape([])
    if reduce == "mean":
        base = x if include_self else scatter_value(x, dim, places, 0)
        total = torch.scatter_add(base, dim, places, source)
        counts = torch.ones_like(x)
        counts = counts if include_self else scatter_value(counts, dim, places, 0)
        counts = torch.scatter_add(counts, dim, places, torch.ones_like(source))
        counts = torch.clamp_min(counts, 1)
        ratio = total / counts
        return ratio if x.is_floating_point() else torch.floor(ratio).to(x.dtype)
    if not include_self:
        neutral = _NEUTRAL[reduce] if x.is_floating_point() else _neutral_integer(reduce, x.dtype)
        base = scatter_value(x, dim, places, neutral)
        return torch.scatter_reduce(base, dim, places, source, reduce)
    if reduce == "sum":
        return torch.scatter_add(x, dim, places, source)
    return _scattered(x, dim, places, source, reduce)


def _neutral_integer(reduce: str, dtype: torch.dtype) -> int:
    limits = torch.iinfo(torch.int32)
    return {"sum": 0, "prod": 1, "amax": limits.min, "amin": limits.max}[reduce]


def _along(x: Tensor, dim: int, places: Tensor) -> Tensor:
    """A vector of indices along an axis, repeated over the others."""
    dim = dim % x.dim()
    shape = [-1 if axis == dim else 1 for axis in range(x.dim())]
    wanted = [places.numel() if axis == dim else size for axis, size in enumerate(x.shape)]
    return places.reshape(shape).expand(wanted)


def _vector_form(x: Tensor, places: Tensor, source: Tensor | None) -> tuple[Any, ...]:
    if x.dim():
        return x, places, source
    return x.reshape(1), places, None if source is None else source.reshape(1)


def index_add(x: Tensor, dim: int, places: Tensor, source: Tensor, *, alpha: Any = 1) -> Tensor:
    """Slices added at an index."""
    shape = x.shape
    x, places, source = _vector_form(x, places, source)
    source = source if alpha == 1 else source * alpha
    return torch.scatter_add(x, dim, _along(x, dim, places), source).reshape(shape)


def index_copy(x: Tensor, dim: int, places: Tensor, source: Tensor) -> Tensor:
    """Slices put at an index."""
    shape = x.shape
    x, places, source = _vector_form(x, places, source)
    return torch.scatter(x, dim, _along(x, dim, places), source).reshape(shape)


def index_fill(x: Tensor, dim: int, places: Tensor, value: Any) -> Tensor:
    """One value in the slices at an index."""
    shape = x.shape
    x, places, _ = _vector_form(x, places, None)
    along = _along(x, dim, places)
    filling = (
        value.to(x.dtype).reshape([1] * x.dim()).expand(along.shape)
        if isinstance(value, Tensor)
        else torch.full(along.shape, value, dtype=x.dtype)
    )
    return torch.scatter(x, dim, along, filling).reshape(shape)


def index_reduce(
    x: Tensor, dim: int, places: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """Slices combined with those at an index."""
    shape = x.shape
    x, places, source = _vector_form(x, places, source)
    along = _along(x, dim, places)
    result = torch.scatter_reduce(x, dim, along, source, reduce, include_self=include_self)
    return result.reshape(shape)


def take(x: Tensor, places: Tensor) -> Tensor:
    """Elements of the flattened tensor."""
    flat = x.reshape(-1)
    picked = flat.index_select(0, wrapped(places, flat.numel()).reshape(-1))
    return picked.reshape(places.shape)


def put(x: Tensor, places: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    """Elements put into the flattened tensor."""
    flat = x.reshape(-1)
    rows, source = wrapped(places, flat.numel()).reshape(-1), source.reshape(-1)
    result = (torch.scatter_add if accumulate else torch.scatter)(flat, 0, rows, source)
    return result.reshape(x.shape)


def masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The elements of the source in turn, where the mask is true."""
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    mask, source = mask.expand(shape).reshape(-1), source.reshape(-1)
    picked = source.index_select(0, _turns(mask, source))
    return torch.where(mask, picked, x.expand(shape).reshape(-1)).reshape(shape)


def repeat_interleave(
    x: Tensor, repeats: Tensor, dim: int | None = None, *, output_size: Any = None
) -> Any:
    """Slices as often as computed numbers say; left alone where their sum is not known."""
    if output_size is None:
        return NotImplemented
    x, dim = (x.reshape(-1), 0) if dim is None else (x, dim % max(x.dim(), 1))
    repeats = repeats.expand([x.shape[dim]])
    return x.index_select(dim, repeated_places(repeats, output_size=output_size))


def repeated_places(repeats: Tensor, *, output_size: Any = None) -> Any:
    """Each place as often as its number says; left alone where their sum is not known."""
    if output_size is None:
        return NotImplemented
    ends = repeats.to(torch.int64).cumsum(0)
    # a copy is of the first place whose copies end behind it
    copies = torch.arange(output_size).reshape(-1, 1)
    return (ends.reshape(1, -1) <= copies).to(torch.int64).sum(1)
