"""Scatters in the forms that the runtime computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphopt.backends.decompositions.comparisons import along, cut, put_back
from graphopt.errors import LoweringError

__all__ = [
    "index_put",
    "scatter",
    "scatter_add",
    "scatter_onto",
    "scatter_value",
]

_MASKS = (torch.bool, torch.uint8)


def _same_but(x: Tensor, index: Tensor, axis: int) -> bool:
    pairs = enumerate(zip(x.shape, index.shape, strict=True))
    return all(int(a) == int(b) for place, (a, b) in pairs if place != axis)


def scatter(x: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """A scatter into as many rows as there are indices, of as many values."""
    return _scatter(x, dim, index, src, None)


def scatter_value(
    x: Tensor, dim: int, index: Tensor, value: float, *, reduce: str | None = None
) -> Tensor:
    """A scatter of one number."""
    src = torch.full_like(index, value, dtype=x.dtype)
    if reduce is None:
        return torch.scatter(x, dim, index, src)
    return torch.scatter(x, dim, index, src, reduce=reduce)


def scatter_add(x: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """A scatter that adds."""
    return _scatter(x, dim, index, src, "add")


def scatter_onto(x: Tensor, dim: int, index: Tensor, src: Tensor, *, reduce: str) -> Tensor:
    """A scatter that adds or multiplies into as many rows as there are indices."""
    if x.ndim and _same_but(x, index, along(x, dim)) and src.shape == index.shape:
        return NotImplemented
    return _scatter(x, dim, index, src, reduce)


def _scatter(x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str | None) -> Tensor:
    if index.numel() == 0:
        return x.clone()
    if x.ndim == 0:
        made = _scatter(x.reshape(1), 0, index.reshape(1), src.reshape(-1)[:1], reduce)
        return made.reshape(())
    axis = along(x, dim)
    fits = _same_but(x, index, axis) and src.shape == index.shape
    if fits and reduce is None:
        return NotImplemented
    own, src = cut(x, index, axis), cut(src, index)
    if reduce is None:
        made = torch.scatter(own, axis, index, src)
    else:
        made = torch.scatter(own, axis, index, src, reduce=reduce)
    return made if fits else put_back(x, made)


def _flat_places(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Places in the flattened tensor, of the shape that indexing would give."""
    shape = [int(size) for size in x.shape]
    every = torch.arange(math.prod(shape), device=x.device).reshape(shape)
    return torch.ops.aten.index.Tensor(every, list(indices))


def index_put(
    whole: Callable[..., Tensor],
    x: Tensor,
    indices: Sequence[Tensor | None],
    values: Tensor,
    accumulate: bool = False,
) -> Tensor:
    """Values of the shape that the indices give; a sum is one at places of the flattened tensor.

    An open number of rows is written along the first axis. Where a mask says which, what is put is
    chosen or takes the places in order.

    Raises:
        LoweringError: A mask stands beside other indices.
    """
    given = [index for index in indices if index is not None]
    if any(index.dtype in _MASKS for index in given):
        if len(given) > 1:
            raise LoweringError(
                "index_put with a mask beside other indices changes as many elements as the mask"
                " says; use torch.where"
            )
        return _masked_put(x, list(indices), values, accumulate)
    if accumulate:
        places = _flat_places(x, indices)
        spread = values.expand(places.shape).reshape(-1)
        flat = torch.scatter_add(x.reshape(-1), 0, places.reshape(-1), spread)
        return flat.reshape(x.shape)
    wanted = torch.ops.aten.index.Tensor(x, list(indices)).shape
    values = values.expand(wanted)
    axis = next(place for place, index in enumerate(indices) if index is not None)
    if axis and len(given) == 1 and given[0].ndim == 1 and isinstance(wanted[axis], torch.SymInt):
        # an open number of rows has to be the first axis
        made = whole(x.movedim(axis, 0), given, values.movedim(axis, 0))
        return made.movedim(0, axis)
    return whole(x, list(indices), values)


def _masked_put(x: Tensor, indices: list[Tensor | None], values: Tensor, add: bool) -> Tensor:
    lead = next(place for place, index in enumerate(indices) if index is not None)
    mask = indices[lead]
    assert mask is not None
    rest = x.ndim - lead - mask.ndim
    chosen = mask.to(torch.bool).reshape([*[1] * lead, *mask.shape, *[1] * rest])
    # the values' axis that counts what is chosen
    counted = values.ndim - rest - 1
    if counted < 0 or values.shape[counted] == 1:
        if counted >= 0:
            values = values.reshape(
                [*values.shape[:counted], *[1] * mask.ndim, *values.shape[counted + 1 :]]
            )
        return torch.where(chosen, x + values if add else values.to(x.dtype), x)
    chosen = chosen.expand(x.shape)
    if add:
        return x + torch.masked_scatter(torch.zeros_like(x), chosen, values)
    return torch.masked_scatter(x, chosen, values.to(x.dtype))
