"""Products of several matrices, by groups too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["addbmm", "conv_transpose", "grouped_mm", "trilinear"]


def addbmm(
    x: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """`beta · x + alpha · Σ a b`, as one product."""
    left = torch.movedim(batch1, 0, 1).flatten(1)
    total = torch.matmul(left, batch2.flatten(0, 1))
    total = total if alpha == 1 else total * alpha
    return total + (x if beta == 1 else x * beta) if beta else total


def trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """Sum of a product of three."""
    del unroll_dim
    for axis in expand1:
        a = torch.unsqueeze(a, axis)
    for axis in expand2:
        b = torch.unsqueeze(b, axis)
    for axis in expand3:
        c = torch.unsqueeze(c, axis)
    made = a * b * c
    return torch.sum(made, list(sumdim)) if sumdim else made


def grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows times the matrix of their group, as one product in which a row is 0 for other groups."""
    del out_dtype
    if a.ndim != 2 or b.ndim != 3 or offs is None or bias is not None:
        return NotImplemented
    row = torch.arange(a.shape[0], device=a.device)[None]
    ends = offs[:, None]
    before = torch.ge(row, ends).to(torch.int64)
    group = torch.sum(before, 0)
    own = torch.eq(group[:, None], torch.arange(b.shape[0], device=a.device)[None])
    spread = torch.where(own[..., None], a[:, None], torch.zeros_like(a)[:, None])
    return torch.matmul(spread.flatten(1), b.flatten(0, 1))


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Transposed convolution of volumes as a plain one of an input with zeros in between.

    Others stay, but where more is added behind than a step is long.
    """
    dims = x.ndim - 2
    step = list(stride) * dims if len(stride) == 1 else list(stride)
    spread = list(dilation) * dims if len(dilation) == 1 else list(dilation)
    more = list(output_padding) * dims if len(output_padding) == 1 else list(output_padding)
    pad = list(padding) * dims if len(padding) == 1 else list(padding)
    odd = any(m >= s and m >= d for m, s, d in zip(more, step, spread, strict=True))
    if not transposed or (dims != 3 and not odd):
        return NotImplemented
    for axis, count in enumerate(step):
        x = _with_zeros(x, axis + 2, count)
    edges: list[int] = []
    for axis in reversed(range(dims)):
        edge = spread[axis] * (int(weight.shape[axis + 2]) - 1) - pad[axis]
        edges += [edge, edge + more[axis]]
    x = torch.constant_pad_nd(x, edges)
    return torch.ops.aten.convolution.default(
        x,
        _turned(weight, groups, dims),
        bias,
        [1] * dims,
        [0] * dims,
        spread,
        False,
        [0] * dims,
        groups,
    )


def _with_zeros(x: Tensor, axis: int, step: int) -> Tensor:
    if step == 1:
        return x
    size = int(x.shape[axis])
    apart = torch.unsqueeze(x, axis + 1)
    apart = torch.constant_pad_nd(apart, [0, 0] * (x.ndim - axis - 1) + [0, step - 1])
    shape = [*x.shape[:axis], size * step, *x.shape[axis + 1 :]]
    return torch.narrow(apart.reshape(shape), axis, 0, (size - 1) * step + 1)


def _turned(weight: Tensor, groups: int, dims: int) -> Tensor:
    turned = torch.flip(weight, list(range(2, dims + 2)))
    inputs, outputs = int(weight.shape[0]), int(weight.shape[1])
    kernel = [int(size) for size in weight.shape[2:]]
    parts = turned.reshape(groups, inputs // groups, outputs, *kernel)
    return torch.transpose(parts, 1, 2).reshape(groups * outputs, inputs // groups, *kernel)
