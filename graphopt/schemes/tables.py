"""Quantized tables: entries on an integer or 8-bit float grid, one scale per table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.numerics.kmeans1d import Clustering, IntGrid, assign_1d, cluster_1d
from graphopt.specs import QuantizationScheme, QuantizationSpec

__all__ = ["StoredTables", "nearest_codes", "quantize_tables", "round_tables"]

_FP8_STORAGE = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}


@dataclass(frozen=True)
class StoredTables:
    """Tables as they are stored.

    Attributes:
        data: Packed bytes, uint8 1-D.
        scale: One per table, in the tables' dtype.
        offset: Zero points in the container's type, or None.
        storage: Name of the element type.
        decoded: The values that they stand for, [tables, k, length].
    """

    data: Tensor
    scale: Tensor
    offset: Tensor | None
    storage: str
    decoded: Tensor


@dataclass(frozen=True)
class _Levels:
    scale: Tensor
    zero_point: Tensor | None
    low: int
    high: int
    storage: str


def quantize_tables(
    vectors: Tensor, weights: Tensor | None, tables: Tensor, qspec: QuantizationSpec
) -> StoredTables:
    """Quantize tables for the values that they serve.

    Scalar integer tables are solved on the integer grid, so that rounding is part of the optimum.

    Args:
        vectors: Values, [tables, n, length].
        weights: Weights of their squared errors, [tables, n].
        tables: Unquantized tables, [tables, k, length].
        qspec: What entries become.
    """
    levels = _levels(tables, qspec)
    if levels is not None and vectors.shape[-1] == 1:
        zero = levels.zero_point
        if zero is None or bool((zero == zero[0]).all()):
            start = 0 if zero is None else int(zero[0])
            grid = IntGrid(levels.scale.double(), levels.low - start, levels.high - start)
            values = vectors[..., 0].float()
            best = cluster_1d(values, [tables.shape[1]], weights=weights, grid=grid)
            tables = best[tables.shape[1]].tables[..., None].to(tables.dtype)
            return _rounded(tables, levels)
    return round_tables(tables, qspec)


def round_tables(tables: Tensor, qspec: QuantizationSpec) -> StoredTables:
    """Round entries to the nearest values that the spec can store."""
    levels = _levels(tables, qspec)
    if levels is not None:
        return _rounded(tables, levels)
    storage = _FP8_STORAGE[qspec.dtype]
    flat = tables.float().reshape(tables.shape[0], -1)
    scale = _stored_scale(flat.abs().amax(1) / torch.finfo(qspec.dtype).max, tables.dtype)
    narrow = (flat / scale[:, None]).to(qspec.dtype)
    decoded = (narrow.float() * scale[:, None]).to(tables.dtype).reshape(tables.shape)
    data = narrow.reshape(-1).view(torch.uint8)
    return StoredTables(data, scale.to(tables.dtype), None, storage, decoded)


def _levels(tables: Tensor, qspec: QuantizationSpec) -> _Levels | None:
    """Scales and the integer range of each table; None for float entries."""
    if qspec.dtype in _FP8_STORAGE:
        return None
    storage = str(qspec.dtype).removeprefix("torch.")
    flat = tables.float().reshape(tables.shape[0], -1)
    low, high = (0, 255) if storage == "uint8" else (-128, 127)
    if qspec.qscheme is QuantizationScheme.ASYMMETRIC:
        smallest, largest = flat.amin(1).clamp_max(0), flat.amax(1).clamp_min(0)
        scale = _stored_scale(largest / 255 - smallest / 255, tables.dtype)
        zero = (low - smallest / scale).round().clamp(low, high)
        return _Levels(scale, zero if zero.any() else None, low, high, storage)
    scale = _stored_scale(flat.abs().amax(1) / 127, tables.dtype)
    zero_point = torch.full_like(scale, 128.0) if storage == "uint8" else None
    if qspec.qscheme is QuantizationScheme.SYMMETRIC_WITH_CLIPPING:
        low, high = (1, 255) if storage == "uint8" else (-127, 127)
    return _Levels(scale, zero_point, low, high, storage)


def _rounded(tables: Tensor, levels: _Levels) -> StoredTables:
    flat = tables.float().reshape(tables.shape[0], -1)
    scale, zero = levels.scale, levels.zero_point
    offset = torch.zeros_like(scale) if zero is None else zero
    steps = (flat / scale[:, None] + offset[:, None]).round().clamp(levels.low, levels.high)
    decoded = ((steps - offset[:, None]) * scale[:, None]).to(tables.dtype).reshape(tables.shape)
    container = torch.uint8 if levels.storage == "uint8" else torch.int8
    data = steps.to(container).reshape(-1).view(torch.uint8)
    stored = None if zero is None else zero.to(container)
    return StoredTables(data, scale.to(tables.dtype), stored, levels.storage, decoded)


def _stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as `dtype` stores them, at least its smallest number, in float32."""
    info = torch.finfo(torch.float32 if dtype is torch.float64 else dtype)
    return scale.to(dtype).float().clamp_min(info.smallest_normal * info.eps)


def nearest_codes(vectors: Tensor, tables: Tensor, weights: Tensor | None) -> Tensor:
    """Codes of the nearest entries; scalar tables must be increasing."""
    if vectors.shape[-1] == 1:
        values, entries = vectors[..., 0], tables[..., 0]
        if values.device.type != "cpu":
            middle = 0.5 * (entries[:, :-1].float() + entries[:, 1:].float())
            wanted = values.detach().float().contiguous()
            return torch.searchsorted(middle.contiguous(), wanted).to(torch.uint8)
        clustering: Clustering = assign_1d(values, entries, weights)
        return clustering.indices
    codes = [
        torch.cdist(group.float(), table.float()).argmin(1)
        for group, table in zip(vectors, tables, strict=True)
    ]
    return torch.stack(codes).to(torch.uint8)
