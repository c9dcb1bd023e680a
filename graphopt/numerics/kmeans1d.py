"""One-dimensional k-means: the optimal table of each group of values, several sizes in one run.

Values are sorted (or, for long groups, counted into 32,768 uniform bins that keep exact first
moments), and a monotone dynamic program over prefix sums finds the best cuts for every number of
parts up to the largest table at once (Wang and Song, "Ckmeans.1d.dp", R Journal 3(2), 2011; the
divide-and-conquer form is Grønlund et al., arXiv 1701.07204, section 2.2). The program chooses
among 12 to 64 cells per part, placed by Panter and Dite's companding density; a second exact program then
moves its cuts to single points. Everything is equivariant to scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphopt.errors import CompressionError
from graphopt.extras import deferred
from graphopt.numerics.device import chosen_device, for_doubles
from graphopt.numerics.kmeans1d_device import cluster_on_device
from graphopt.numerics.parallel import map_tasks

if TYPE_CHECKING:
    from graphopt.numerics import kernels, kernels_points
else:
    kernels = deferred("graphopt.numerics.kernels")
    kernels_points = deferred("graphopt.numerics.kernels_points")

__all__ = ["Clustering", "IntGrid", "assign_1d", "cluster_1d", "look_up", "sum_of_squares"]

_BINS = 32_768
_LONG_GROUP = 262_144
_MIN_CELLS = 128
_MANY_GROUPS = 64
_TASK_VALUES = 1 << 22
_CELLS_PER_PART = 12
# More cells than that are for rows whose sorting takes longer than the choice among them.
_POINTS_PER_CELL = 128
# A part narrower than this many bins is not resolved by the histogram; the group is sorted instead.
_MIN_BINS_PER_PART = 16
_NO_WEIGHTS: npt.NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)


@dataclass(frozen=True)
class IntGrid:
    """Centroids confined to `step · {low … high}`.

    Attributes:
        step: Distance of two levels for each group, float64 [groups]; above 0.
        low: Lowest level.
        high: Highest level.
    """

    step: Tensor
    low: int
    high: int


@dataclass(frozen=True)
class Clustering:
    """Tables and assignments of all groups of one tensor.

    Attributes:
        tables: Increasing centroids, [groups, k], dtype of the values.
        indices: Nearest centroid of each value, [groups, n], uint8.
        sse: Weighted sum of squared errors of each group, [groups], float64.
    """

    tables: Tensor
    indices: Tensor
    sse: Tensor

    def on(self, device: torch.device) -> Clustering:
        """The same with tables and assignments there."""
        return replace(self, tables=self.tables.to(device), indices=self.indices.to(device))

    def dense(self) -> Tensor:
        """The values that the tables stand for, [groups, n]."""
        return look_up(self.indices, self.tables)


def cluster_1d(
    values: Tensor,
    ks: Sequence[int],
    *,
    weights: Tensor | None = None,
    grid: IntGrid | None = None,
    method: str = "fast",
) -> dict[int, Clustering]:
    """Optimal tables of `k` entries for each row of `values`, for every `k` in `ks`.

    Args:
        values: [groups, n], floating point, any device; at least one value per group.
        ks: Table sizes, each in 1 … 256; one run of the program serves all of them.
        weights: Weight of each value's squared error, same shape, finite and not negative; a group
            whose weights are all zero is clustered unweighted.
        grid: Confine centroids to an integer grid (quantized tables); solved inside the program,
            not by rounding afterwards.
        method: "fast" (within 0.1 % of the optimum, mostly equal to it) or "exact" (one program over
            every value; for short groups "fast" is that too).

    Returns:
        `k` → tables and assignments, on the device of `values`; tables have the dtype of `values`.

    Raises:
        CompressionError: Values or weights are NaN or infinite, or weights are negative.
        ValueError: `ks`, `method` or a shape is wrong.
    """
    sizes = sorted(set(ks))
    if not sizes or sizes[0] < 1 or sizes[-1] > 256:
        raise ValueError(f"table sizes must lie in 1 … 256, got {list(ks)}")
    if values.ndim != 2 or values.numel() == 0:
        raise ValueError(f"values must be [groups, n] and not empty, got {tuple(values.shape)}")
    if weights is not None and weights.shape != values.shape:
        raise ValueError(f"weights have shape {tuple(weights.shape)}, values {tuple(values.shape)}")
    if method not in ("fast", "exact"):
        raise ValueError(f"method must be 'fast' or 'exact', got {method!r}")
    device = chosen_device() or values.device
    if (values.device.type != "cpu" or chosen_device() is not None) and method == "fast":
        step = None if grid is None else (grid.step, grid.low, grid.high)
        by_size = cluster_on_device(values.to(device), sizes, weights, step)
        home = values.device
        return {
            k: Clustering(table.to(home), indices.to(home), sse.to(home))
            for k, (table, indices, sse) in by_size.items()
        }

    n_groups = values.shape[0]
    steps = np.zeros(n_groups) if grid is None else grid.step.double().cpu().numpy()
    levels = (0.0, 0.0) if grid is None else (float(grid.low), float(grid.high))
    confined = _Levels(steps, *levels)
    result = {k: _empty(values, k) for k in sizes}

    def fit(part: slice) -> None:
        x = _floats(values[part])
        if not kernels_points.finite_range(x.reshape(-1))[2]:
            raise CompressionError("values contain NaN or Inf")
        raw = _NO_WEIGHTS if weights is None else _floats(weights[part])
        tables = np.empty((x.shape[0], sum(sizes)))
        _fit_rows(x, _normalised(raw), sizes, confined.of(part), method, n_groups, tables)
        at = 0
        for k in sizes:
            # the stored type is what counts: round first, assign afterwards
            increasing = np.maximum.accumulate(tables[:, at : at + k], axis=1)
            result[k].tables[part] = torch.from_numpy(increasing).to(values.dtype)
            _assign(x, raw, result[k], part)
            at += k

    for _ in map_tasks(fit, _row_tasks(values.shape)):
        pass
    return {k: each.on(values.device) for k, each in result.items()}


def look_up(codes: Tensor, tables: Tensor) -> Tensor:
    """`tables[g, codes[g, i]]` for each group g.

    Args:
        codes: [groups, n] uint8.
        tables: [groups, k], floating point.
    """
    if codes.device.type != "cpu" or tables.dtype is not torch.float32:
        return tables.gather(1, codes.long())
    dense = np.empty(codes.shape, dtype=np.float32)
    kernels_points.look_up(codes.contiguous().numpy(), tables.contiguous().numpy(), dense)
    return torch.from_numpy(dense)


def sum_of_squares(tensor: Tensor) -> float:
    """Σ x² in float64."""
    flat = tensor.detach().reshape(-1)
    flat = flat.to(for_doubles(flat.device))
    if flat.device.type != "cpu" or flat.dtype is torch.float64:
        return float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2
    parts = flat.split(_TASK_VALUES) if flat.dtype is not torch.float32 else (flat,)
    return sum(float(kernels_points.sum_of_squares(part.float().numpy())) for part in parts)


def assign_1d(values: Tensor, tables: Tensor, weights: Tensor | None = None) -> Clustering:
    """Assign each value to the nearest entry of its group's table.

    Args:
        values: [groups, n], floating point, finite.
        tables: [groups, k], each row increasing.
        weights: Weights of the squared errors, shape of `values`.

    Returns:
        The tables as given, with indices and errors.
    """
    result = replace(_empty(values, tables.shape[1]), tables=tables.cpu())

    def assign(part: slice) -> None:
        raw = _NO_WEIGHTS if weights is None else _floats(weights[part])
        _assign(_floats(values[part]), raw, result, part)

    for _ in map_tasks(assign, _row_tasks(values.shape)):
        pass
    return result.on(values.device)


def _empty(values: Tensor, k: int) -> Clustering:
    groups = values.shape[0]
    return Clustering(
        torch.empty(groups, k, dtype=values.dtype),
        torch.empty(values.shape, dtype=torch.uint8),
        torch.empty(groups, dtype=torch.float64),
    )


def _floats(rows: Tensor) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(rows.detach().to("cpu", torch.float32).numpy())


def _assign(
    x: npt.NDArray[np.float32], w: npt.NDArray[np.float32], to: Clustering, part: slice
) -> None:
    """Assign the values of some groups, whose tables stand there already."""
    entries = np.ascontiguousarray(to.tables[part].to(torch.float32).numpy())
    indices, sse = to.indices[part].numpy(), to.sse[part].numpy()
    kernels_points.assign_groups(x, entries, w, indices, _NO_WEIGHTS, sse)


def _row_tasks(shape: Sequence[int]) -> list[slice]:
    """Groups side by side, few enough for their values in float32 to be small beside a model."""
    n_groups = shape[0]
    chunk = -(-n_groups // (4 * max(torch.get_num_threads(), 1)))
    chunk = max(1, min(chunk, _TASK_VALUES // max(shape[1], 1)))
    return [slice(start, start + chunk) for start in range(0, n_groups, chunk)]


def _normalised(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Weights with a largest one of 1 in each group, so that tiny ones do not underflow."""
    if weights.size == 0:
        return weights
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise CompressionError("sensitivities must be finite and not negative")
    peak = weights.max(axis=1, keepdims=True)
    scaled = weights / np.where(peak > 0, peak, 1)
    scaled[peak[:, 0] == 0] = 1
    return scaled.astype(np.float32)


@dataclass(frozen=True)
class _Levels:
    """Integer levels that centroids are confined to: `step · i`, low ≤ i ≤ high; step 0 is free.

    Attributes:
        steps: Of each group.
        low: Least level.
        high: Largest level.
    """

    steps: npt.NDArray[np.float64]
    low: float
    high: float

    def of(self, groups: slice | npt.NDArray[np.int64]) -> _Levels:
        """Those of some groups."""
        return _Levels(self.steps[groups], self.low, self.high)


def _fit_rows(
    x: npt.NDArray[np.float32],
    w: npt.NDArray[np.float32],
    sizes: list[int],
    grid: _Levels,
    method: str,
    n_groups: int,
    tables: npt.NDArray[np.float64],
) -> None:
    """Fit the rows of one task; long rows go through the histogram one by one."""
    ks = np.array(sizes, dtype=np.int64)
    cells = max(_CELLS_PER_PART * sizes[-1], _MIN_CELLS)
    if n_groups < _MANY_GROUPS:
        # one table per tensor: the program over cells is a small part of the work on long rows
        cells = max(cells, min(64 * sizes[-1], 4096, x.shape[1] // _POINTS_PER_CELL))
    if x.shape[1] >= _LONG_GROUP and method == "fast":
        rows = range(x.shape[0])
        sorted_rows = [row for row in rows if not _fit_long(row, x, w, ks, cells, grid, tables)]
        if not sorted_rows:
            return
        rest = np.array(sorted_rows)
        part = np.empty((rest.size, tables.shape[1]))
        _fit_sorted(x[rest], w if w.size == 0 else w[rest], ks, cells, grid.of(rest), part)
        tables[rest] = part
        return
    if method == "exact":
        cells = x.shape[1]
    _fit_sorted(x, w, ks, cells, grid, tables)


def _fit_sorted(
    x: npt.NDArray[np.float32],
    w: npt.NDArray[np.float32],
    ks: npt.NDArray[np.int64],
    cells: int,
    grid: _Levels,
    tables: npt.NDArray[np.float64],
) -> None:
    if w.size:
        order = np.argsort(x, axis=1)
        points = np.take_along_axis(x, order, 1)
        mass = np.take_along_axis(w, order, 1).astype(np.float64)
    else:
        points, mass = np.sort(x, axis=1), np.empty((0, 0))
    kernels.fit_groups(points, mass, ks, cells, grid.steps, grid.low, grid.high, tables)


def _fit_long(
    row: int,
    x: npt.NDArray[np.float32],
    w: npt.NDArray[np.float32],
    ks: npt.NDArray[np.int64],
    cells: int,
    grid: _Levels,
    tables: npt.NDArray[np.float64],
) -> bool:
    """Fit one long row from a histogram; False when its bins are too coarse for the parts found."""
    values = x[row]
    low, high, _ = kernels_points.finite_range(values)
    span = float(high) - float(low)
    if span <= 0.0:
        return False
    inverse_step = _BINS / span
    if not np.isfinite(inverse_step):
        return False
    count, total = np.zeros(_BINS), np.zeros(_BINS)
    sample_weight = w[row] if w.size else np.empty(0, dtype=np.float32)
    kernels_points.histogram_moments(values, sample_weight, float(low), inverse_step, count, total)
    used = count > 0
    points = (total[used] / count[used])[None]
    kernels.fit_groups(
        points,
        count[used][None],
        ks,
        cells,
        grid.steps[row : row + 1],
        grid.low,
        grid.high,
        tables[row : row + 1],
    )
    largest = np.sort(tables[row, -int(ks[-1]) :])
    return bool(np.diff(largest).min(initial=np.inf) * inverse_step >= _MIN_BINS_PER_PART)
