"""Resizing and resampling of images."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from graphopt.backends.coreml.mil.values import Array, Rule, Values, tensor
from graphopt.errors import VerificationError

__all__ = ["RESIZING"]


def _points(size: int, out: int, mode: str) -> torch.Tensor:
    """Where a resized axis of `out` elements reads one of `size`, in its elements."""
    steps = torch.arange(out, dtype=torch.float64)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if out == 1:
            middle = (size - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0
            return torch.tensor([middle], dtype=torch.float64)
        points = steps * ((size - 1) / (out - 1))
    elif mode == "DEFAULT":
        points = steps * (size / out)
    elif mode == "UNALIGN_CORNERS":
        points = (steps + 0.5) * (size / out) - 0.5
    elif mode == "OFFSET_CORNERS":
        points = (steps + 0.5) * (max(1, size - 1) / out)
    else:
        raise VerificationError(f"sampling mode {mode}")
    return points.clamp(0, size - 1)


def _linear(x: torch.Tensor, axis: int, points: torch.Tensor) -> torch.Tensor:
    low = points.floor().long()
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    shape = [1] * x.dim()
    shape[axis] = -1
    part = (points - low).to(x.dtype).reshape(shape)
    return x.index_select(axis, low) * (1 - part) + x.index_select(axis, high) * part


def _resized(x: torch.Tensor, sizes: list[int], mode: str, nearest: bool = False) -> Array:
    for offset, out in enumerate(sizes):
        axis = x.dim() - len(sizes) + offset
        if nearest:
            points = torch.arange(out, dtype=torch.float64) * (x.shape[axis] / out)
            x = x.index_select(axis, points.floor().long().clamp(max=x.shape[axis] - 1))
        elif x.shape[axis] != out or mode == "OFFSET_CORNERS":
            x = _linear(x, axis, _points(x.shape[axis], out, mode))
    return x.numpy()


def _scaled(v: Values) -> list[int]:
    h, w = v["x"].shape[-2:]
    return [
        int(np.floor(h * v.get("scale_factor_height", 1))),
        int(np.floor(w * v.get("scale_factor_width", 1))),
    ]


def _target(v: Values) -> list[int]:
    return [int(v.get("target_size_height", 1)), int(v.get("target_size_width", 1))]


def upsample_bilinear(v: Values) -> Array:
    """By factors, recomputed from the sizes."""
    aligned = bool(v.get("align_corners", True))
    mode = "STRICT_ALIGN_CORNERS" if aligned else "UNALIGN_CORNERS"
    return _resized(tensor(v["x"]), _scaled(v), mode)


def resize(v: Values) -> Array:
    """The last axes of iOS 17's op; a size of 0 keeps the axis."""
    x, n = tensor(v["x"]), int(v["resized_dims"])
    wanted = [int(size) for size in np.atleast_1d(v["shape"])[-n:]]
    sizes = [size or x.shape[x.dim() - n + i] for i, size in enumerate(wanted)]
    mode = str(v.get("sampling_mode", "DEFAULT"))
    nearest = str(v.get("interpolation_mode", "LINEAR")) == "NEAREST_NEIGHBOR"
    if nearest and mode != "DEFAULT":
        raise VerificationError(f"resize to the nearest neighbour, sampling mode {mode}")
    return _resized(x, sizes, mode, nearest)


def resample(v: Values) -> Array:
    """The image at given coordinates."""
    x, grid = tensor(v["x"]), tensor(v["coordinates"]).float()
    aligned = bool(v["align_corners"])
    size = torch.tensor([x.shape[3], x.shape[2]], dtype=torch.float32)
    kind = str(v["coordinates_mode"])
    if kind == "unnormalized":
        grid = 2 * grid / (size - 1).clamp(min=1) - 1 if aligned else (2 * grid + 1) / size - 1
    elif kind == "normalized_zero_to_one":
        grid = 2 * grid - 1
    # what is mirrored at the centre of the edge is torch's reflection when aligned, else not
    padding = {"constant": "zeros", "border": "border"}
    padding["reflection" if aligned else "symmetric"] = "reflection"
    chosen = padding.get(str(v["padding_mode"]))
    if chosen is None:
        raise VerificationError(f"resample, padding mode {v['padding_mode']}, aligned {aligned}")
    value = float(v.get("padding_value", 0)) if chosen == "zeros" else 0.0
    mode = str(v["sampling_mode"])
    return (F.grid_sample(x - value, grid, mode, chosen, aligned) + value).numpy()


def affine(v: Values) -> Array:
    """The image at linearly transformed coordinates, aligned, zero outside."""
    x, matrix = tensor(v["x"]), tensor(v["transform_matrix"]).reshape(-1, 2, 3)
    matrix = matrix.expand(x.shape[0], 2, 3)
    shape = [*x.shape[:2], int(v["output_height"]), int(v["output_width"])]
    grid = F.affine_grid(matrix, shape, align_corners=True)
    return F.grid_sample(x, grid, "bilinear", "zeros", align_corners=True).numpy()


RESIZING: dict[str, Rule] = {
    "upsample_nearest_neighbor": lambda v: _resized(tensor(v["x"]), _scaled(v), "", nearest=True),
    "resize_nearest_neighbor": lambda v: _resized(tensor(v["x"]), _target(v), "", nearest=True),
    "upsample_bilinear": upsample_bilinear,
    "resize_bilinear": lambda v: _resized(
        tensor(v["x"]), _target(v), str(v.get("sampling_mode", "DEFAULT"))
    ),
    "resize": resize,
    "resample": resample,
    "affine": affine,
}
