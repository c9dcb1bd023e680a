"""Our ops as nodes of a domain of their own in the exported graph; `expand` writes them in ONNX's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.analysis.quantized import quantized_ops

__all__ = ["DOMAIN", "rules"]

DOMAIN = "graphopt"
_ours = torch.ops.graphopt


def rules() -> dict[Any, Callable[..., Any]]:
    """Op of our vocabulary → what `run_decompositions` puts in its place."""
    ops = quantized_ops()
    return {
        _ours.lut_to_dense.default: _lut_to_dense,
        _ours.shift_scale.default: _shift_scale,
        _ours.sparse_to_dense.default: _sparse_to_dense,
        _ours.round_to_float.default: _round_to_float,
        ops.quantize_per_tensor.default: _quantize,
        ops.dequantize_per_tensor.default: _dequantize,
        ops.quantize_per_channel.default: _quantize_channels,
        ops.dequantize_per_channel.default: _dequantize_channels,
    }


def _node(
    name: str,
    inputs: Sequence[Tensor | None],
    attributes: dict[str, Any],
    dtype: torch.dtype,
    shape: Sequence[Any],
) -> Tensor:
    made: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, attributes, dtype=dtype, shape=list(shape), version=1
    )
    return made


def _lut_to_dense(
    indices: Tensor, lut: Tensor, n_bits: int, shape: list[int], vector_axis: int | None = None
) -> Tensor:
    attributes = {"n_bits": n_bits, "vector_axis": -1 if vector_axis is None else vector_axis}
    return _node("lut_to_dense", [indices, lut], attributes, lut.dtype, shape)


def _shift_scale(
    data: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    storage: str,
    shape: list[int],
    out_dtype: torch.dtype,
) -> Tensor:
    inputs = [data, scale] if offset is None else [data, scale, offset]
    return _node("shift_scale", inputs, {"storage": storage}, out_dtype, shape)


def _sparse_to_dense(values: Tensor, mask: Tensor, shape: list[int]) -> Tensor:
    return _node("sparse_to_dense", [values, mask], {}, values.dtype, shape)


def _round_to_float(x: Tensor, scale: float, storage: str) -> Tensor:
    attributes = {"scale": scale, "storage": storage}
    return _node("round_to_float", [x], attributes, x.dtype, x.shape)


def _quantize(
    x: Tensor, scale: float, zero: int, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    attributes = {"scale": scale, "zero": zero, "low": low, "high": high}
    return _node("quantize", [x], attributes, dtype, x.shape)


def _dequantize(
    x: Tensor,
    scale: float,
    zero: int,
    low: int,
    high: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    attributes = {"scale": scale, "zero": zero, "low": low, "high": high}
    return _node("dequantize", [x], attributes, out_dtype or torch.float32, x.shape)


def _quantize_channels(
    x: Tensor, scales: Tensor, zeros: Tensor, axis: int, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    attributes = {"axis": axis, "low": low, "high": high}
    return _node("quantize", [x, scales, zeros], attributes, dtype, x.shape)


def _dequantize_channels(
    x: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    axis: int,
    *limits: Any,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    low, high, _ = limits
    inputs = [x, scales] if zeros is None else [x, scales, zeros]
    attributes = {"axis": axis, "low": low, "high": high}
    return _node("dequantize", inputs, attributes, out_dtype or torch.float32, x.shape)
