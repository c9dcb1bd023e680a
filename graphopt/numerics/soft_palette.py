"""Soft assignment of weights to table entries, and its gradient at the memory of a histogram.

Differentiable k-means (Cho et al., DKM, arXiv 2108.12659, section 3.2): with attention
`A = softmax(−|w − c|² / τ)`, tables follow the weights, `c ← Aᵀw / Aᵀ1`, and weights become `A·c`. Where
many scalars share a table, attention is computed for their distinct 16-bit values only (eDKM, Cho
et al., arXiv 2309.00964, section 2.2); gradients are those of every weight. Nothing of the size
weights × entries outlives a chunk: the backward pass computes it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from graphopt.numerics.device import for_doubles

__all__ = ["soft_palette"]

_CHUNK = 1 << 21  # elements of an attention matrix that exist at a time
_MANY = 32_768  # scalars of one table from which distinct values pay


def soft_palette(
    vectors: Tensor, tables: Tensor, temperature: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Weights as soft mixtures of table entries, and the tables that they were mixed from.

    Args:
        vectors: Weights, [groups, n, length]; gradients flow to them.
        tables: Tables to start from, [groups, k, length], detached.
        temperature: τ of each group, [groups], in squared units of the weights.
        iterations: Soft k-means steps, at least 1.

    Returns:
        Soft weights of the shape of `vectors`, and the final tables, detached.
    """
    mixed, final = _SoftPalette.apply(vectors, tables.detach(), temperature, iterations)
    return mixed, final.detach()


class _SoftPalette(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, vectors: Tensor, tables: Tensor, temperature: Tensor, iterations: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(vectors, tables, temperature)
        ctx.iterations = iterations
        mixed, final = torch.empty_like(vectors), torch.empty_like(tables)
        with torch.no_grad():
            for part in _parts(vectors, tables):
                points, mass, inverse = _distinct(vectors[part])
                table = _iterate(points, mass, tables[part], temperature[part], iterations)
                values = _mix(points, table, temperature[part])
                mixed[part] = values if inverse is None else _spread(values, inverse)
                final[part] = table
        ctx.mark_non_differentiable(final)
        return mixed, final

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        vectors, tables, temperature = ctx.saved_tensors
        gradient = gradients[0]
        result = torch.empty_like(vectors)
        for part in _parts(vectors, tables):
            points, mass, inverse = _distinct(vectors[part])
            tau = temperature[part]
            with torch.enable_grad():
                own = points.detach().requires_grad_()
                moving = points.detach().requires_grad_()
                table = _iterate(moving, mass, tables[part], tau, ctx.iterations)
                mixed = _mix(own, table, tau)
                if inverse is None:
                    near, far = torch.autograd.grad(mixed, (own, moving), gradient[part])
                    result[part] = near + far
                    continue
                total = _sums(inverse, gradient[part].reshape(-1), points.shape[1])
                weighted = (mixed[0, :, 0] * total.to(mixed.dtype).to(mixed.device)).sum()
                (slopes,) = torch.autograd.grad(mixed.sum(), own, retain_graph=True)
                (far,) = torch.autograd.grad(weighted, moving)
            assert mass is not None
            pull = far[0, :, 0] / mass[0]
            flat, given = result[part].view(-1), gradient[part].reshape(-1)
            for where in _pieces(len(inverse)):
                index = inverse[where]
                flat[where] = given[where] * slopes[0, :, 0][index] + pull[index]
        return result, None, None, None


def _parts(vectors: Tensor, tables: Tensor) -> list[slice]:
    """Groups that are worked on together."""
    groups, n = vectors.shape[0], vectors.shape[1]
    step = 1 if n > _MANY else max(1, _CHUNK // (n * tables.shape[1]))
    return [slice(start, min(start + step, groups)) for start in range(0, groups, step)]


def _distinct(vectors: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Distinct values of one long group of scalars, how often they occur, and which is whose.

    Values are compared as 16-bit floats of the share of the largest; each class is represented by
    its mean. Groups that are short or of vectors stay as they are (None, None).
    """
    if vectors.shape[0] != 1 or vectors.shape[1] <= _MANY or vectors.shape[2] != 1:
        return vectors, None, None
    flat = vectors.reshape(-1)
    unit = flat.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    inverse = torch.empty(len(flat), dtype=torch.int32, device=flat.device)
    count = torch.zeros(65_536, dtype=torch.int64, device=flat.device)
    for where in _pieces(len(flat)):
        keys = (flat[where] / unit).to(torch.float16).view(torch.int16).int() + 32_768
        inverse[where] = keys
        count += torch.bincount(keys, minlength=65_536)
    used = count > 0
    number = used.cumsum(0).int() - 1
    for where in _pieces(len(flat)):
        inverse[where] = number[inverse[where]]
    mass = count[used].to(vectors.dtype)
    total = _sums(inverse, flat, len(mass))
    points = (total / mass.to(total.device).double()).to(vectors.dtype).to(vectors.device)
    return points[None, :, None], mass[None], inverse


def _pieces(count: int) -> Iterator[slice]:
    """Slices of a long tensor, so that temporaries stay small."""
    for start in range(0, count, _CHUNK // 4):
        yield slice(start, start + _CHUNK // 4)


def _sums(index: Tensor, values: Tensor, length: int) -> Tensor:
    """Σ of the values of each index, float64 [length], where there is float64."""
    home = for_doubles(values.device)
    total = torch.zeros(length, dtype=torch.float64, device=home)
    for where in _pieces(len(index)):
        part = values[where].to(home).double()
        total += torch.bincount(index[where].to(home), part, minlength=length)
    return total


def _spread(values: Tensor, inverse: Tensor) -> Tensor:
    return values[0, :, 0][inverse][None, :, None]


def _attention(points: Tensor, tables: Tensor, temperature: Tensor) -> Tensor:
    # one dimension after the other: a matrix product would cancel where distances are small
    distance = sum(
        (points[:, :, axis, None] - tables[:, None, :, axis]).square()
        for axis in range(points.shape[2])
    )
    return torch.softmax(-distance / temperature[:, None, None], dim=2)


def _moments(
    points: Tensor, mass: Tensor | None, tables: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    attention = _attention(points, tables, temperature)
    if mass is not None:
        attention = attention * mass[:, :, None]
    return attention.sum(1), attention.mT @ points


def _mixture(points: Tensor, tables: Tensor, temperature: Tensor) -> Tensor:
    return _attention(points, tables, temperature) @ tables


def _iterate(
    points: Tensor, mass: Tensor | None, tables: Tensor, temperature: Tensor, iterations: int
) -> Tensor:
    step = _points_per_chunk(points, tables)
    for _ in range(iterations):
        weight, total = torch.zeros_like(tables[:, :, 0]), torch.zeros_like(tables)
        for start in range(0, points.shape[1], step):
            part = slice(start, start + step)
            share = None if mass is None else mass[:, part]
            moments = checkpoint(
                _moments, points[:, part], share, tables, temperature, use_reentrant=False
            )
            weight, total = weight + moments[0], total + moments[1]
        # an entry that nothing attends to stays where it is
        empty = weight[:, :, None] < 1e-6
        tables = torch.where(empty, tables, total / weight.clamp_min(1e-6)[:, :, None])
    return tables


def _mix(points: Tensor, tables: Tensor, temperature: Tensor) -> Tensor:
    step = _points_per_chunk(points, tables)
    parts = [
        checkpoint(_mixture, part, tables, temperature, use_reentrant=False)
        for part in points.split(step, dim=1)
    ]
    return torch.cat(parts, dim=1)


def _points_per_chunk(points: Tensor, tables: Tensor) -> int:
    return max(1, _CHUNK // (points.shape[0] * tables.shape[1]))
