"""The clustering of `kmeans1d` with sorting, sums, Lloyd's steps and assignment on a torch device.

Only the dynamic program over a few hundred cells per group runs on the CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import CompressionError
from graphopt.extras import deferred
from graphopt.numerics.device import for_doubles

if TYPE_CHECKING:
    from graphopt.numerics import kernels
else:
    kernels = deferred("graphopt.numerics.kernels")

__all__ = ["cluster_on_device"]

_LLOYD_STEPS = 64
_Parts = tuple[Tensor, Tensor, Tensor]


def cluster_on_device(
    values: Tensor,
    ks: list[int],
    weights: Tensor | None,
    grid: tuple[Tensor, int, int] | None,
) -> dict[int, _Parts]:
    """Cluster each row of `values` on its own device, all rows at once.

    Args:
        values: [groups, n], floating point.
        ks: Increasing table sizes.
        weights: Weights of the same shape, or None.
        grid: (step per group, lowest level, highest level), or None.

    Returns:
        `k` → (tables [groups, k], indices [groups, n] uint8, sse [groups] float64).

    Raises:
        CompressionError: Values or weights are not finite, or weights are negative.
    """
    if not torch.isfinite(values).all():
        raise CompressionError("values contain NaN or Inf")
    if weights is not None and not (torch.isfinite(weights).all() and (weights >= 0).all()):
        raise CompressionError("sensitivities must be finite and not negative")
    x, order = values.detach().float().sort(dim=1)
    # float64 sums; a device without float64 leaves them to the CPU
    home = for_doubles(x.device)
    points = x.to(home, torch.float64)
    if weights is None:
        mass = torch.ones_like(points)
    else:
        mass = weights.detach().to(home, torch.float64).gather(1, order.to(home))
        peak = mass.amax(dim=1, keepdim=True)
        mass = torch.where(peak > 0, mass / peak.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    shift = (mass * points).sum(1, keepdim=True) / mass.sum(1, keepdim=True)
    if grid is not None:
        shift = torch.zeros_like(shift)
    zero = torch.zeros_like(shift)
    w = torch.cat([zero, mass.cumsum(1)], dim=1)
    wx = torch.cat([zero, (mass * (points - shift)).cumsum(1)], dim=1)
    edges = _companding_edges(points, mass, max(64 * ks[-1], 2048))
    tables = _tables_on_cells(w.gather(1, edges), wx.gather(1, edges), shift, ks, grid)
    step = None if grid is None else grid[0].to(home, torch.float64)[:, None]
    result: dict[int, _Parts] = {}
    for k, start in tables.items():
        table = start.to(home)
        for _ in range(_LLOYD_STEPS):
            bounds = _bounds(points, table)
            part_mass = w.gather(1, bounds).diff(dim=1)
            mean = wx.gather(1, bounds).diff(dim=1) / part_mass.clamp_min(1e-300)
            if step is not None and grid is not None:
                mean = step * (mean / step).round().clamp(grid[1], grid[2])
            updated = torch.where(part_mass > 0, mean + shift, table).sort(dim=1).values
            if torch.equal(updated, table):
                break
            table = updated
        stored = table.to(values.device, values.dtype)
        middle = 0.5 * (stored[:, :-1].float() + stored[:, 1:].float())
        raw = values.detach().float().contiguous()
        indices = torch.searchsorted(middle.contiguous(), raw)
        error = (raw - stored.float().gather(1, indices)).to(home, torch.float64).square()
        if weights is not None:
            error = error * weights.detach().to(home, torch.float64)
        result[k] = (stored, indices.to(torch.uint8), error.sum(1).to(home))
    return result


def _companding_edges(points: Tensor, mass: Tensor, cells: int) -> Tensor:
    """Positions that bound cells of equal share of ∫ p^(1/3) dx, [groups, cells + 1]."""
    n = points.shape[1]
    if n <= cells:
        return torch.arange(n + 1, device=points.device).expand(points.shape[0], -1).contiguous()
    gap = points.diff(dim=1, prepend=points[:, :1])
    share = (mass * gap.square()).pow(1 / 3)
    for _ in range(8):
        # no gap, however long, is worth more than the one cut that it gets
        share = torch.minimum(share, share.sum(1, keepdim=True) / cells)
    share = share.cumsum(1)
    at = torch.linspace(0, 1, cells + 1, device=points.device, dtype=torch.float64)
    edges = torch.searchsorted(share, (share[:, -1:] * at).contiguous())
    edges[:, 0] = 0
    edges[:, -1] = n
    return edges


def _bounds(points: Tensor, table: Tensor) -> Tensor:
    """Positions of the sorted `points` that bound the parts nearest to each entry."""
    middle = (0.5 * (table[:, :-1] + table[:, 1:])).contiguous()
    inner = torch.searchsorted(points, middle, right=True)
    first = torch.zeros_like(inner[:, :1]) if inner.shape[1] else inner.new_zeros(len(points), 1)
    return torch.cat([first, inner, torch.full_like(first, points.shape[1])], dim=1)


def _tables_on_cells(
    w: Tensor, wx: Tensor, shift: Tensor, ks: list[int], grid: tuple[Tensor, int, int] | None
) -> dict[int, Tensor]:
    """Centroids of the best cuts among the cells, by the exact program on the CPU."""
    w_cpu, wx_cpu = w.cpu().numpy(), wx.cpu().numpy()
    groups = w_cpu.shape[0]
    steps = np.zeros(groups) if grid is None else grid[0].double().cpu().numpy()
    low, high = (0.0, 0.0) if grid is None else (float(grid[1]), float(grid[2]))
    sums = kernels.cut_groups(w_cpu, wx_cpu, np.array(ks, dtype=np.int64), steps, low, high)
    tables: dict[int, Tensor] = {}
    at = 0
    for k in ks:
        tables[k] = torch.from_numpy(sums[:, at : at + k].copy()) + shift.cpu()
        at += k
    return tables
