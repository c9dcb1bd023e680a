"""Ops that kernels or XNNPACK compute otherwise for some arguments, in others that they get right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.backends.decompositions import pooling, products
from graphopt.ir.torch_private import decomposition_table

__all__ = [
    "as_it_is",
    "average_volumes",
    "bilinear",
    "convolution",
    "exp2",
    "in_single",
    "largest_along",
    "of_a_batch",
    "prelu",
    "remainder",
]


def exp2(x: Tensor) -> Tensor:
    """`e^(x ln 2)` in the base's own kernel."""
    return torch.pow(2.0, x)


def of_a_batch(whole: Callable[..., Tensor], x: Tensor, *given: Any) -> Any:
    """Pooling of one image as that of a batch of one, which XNNPACK's partitioner takes it for."""
    return whole(x.unsqueeze(0), *given).squeeze(0) if x.ndim == 3 else NotImplemented


def largest_along(whole: Callable[..., Any], x: Tensor, dim: int, keepdim: bool = False) -> Any:
    """Largest values along an axis and where they are.

    XNNPACK's partitioner takes images along every axis; what converts them only keeps an axis, and only
    a height or a width.
    """
    if x.ndim != 4:
        return whole(x, dim, keepdim)
    dim %= 4
    if dim < 2:
        flat = whole(x.reshape(*x.shape[:2], -1), dim, True)
        kept = [y.reshape(*y.shape[:2], *x.shape[2:]) for y in flat]
    else:
        kept = whole(x, dim, True)
    return tuple(y if keepdim else y.squeeze(dim) for y in kept)


def in_single(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule that computes in float32 what the kernel would add up, or multiply, in 16 bits."""

    def narrow(whole: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.dtype not in (torch.float16, torch.bfloat16):
            return rule(whole, x, *args, **kwargs)
        wide = pytree.tree_map_only(Tensor, _widened, (x, *args))
        made = rule(whole, *wide, **kwargs)
        made = whole(*wide, **kwargs) if made is NotImplemented else made
        return pytree.tree_map_only(Tensor, lambda y: y.to(kwargs.get("dtype") or x.dtype), made)

    return narrow


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def as_it_is(whole: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The op itself."""
    del whole, args, kwargs
    return NotImplemented


def prelu(whole: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Any:
    """The slope of what is below zero, which XNNPACK takes of images alone."""
    del whole
    if x.ndim == 4:
        return NotImplemented
    shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)] if weight.numel() > 1 else []
    slope = weight.reshape(shape)
    return torch.where(torch.gt(x, 0), x, slope * x)


def remainder(whole: Callable[..., Tensor], x: Tensor, y: Any) -> Tensor:
    """The remainder of integers with the divisor's sign, which the kernel gives the dividend's."""
    given = y if isinstance(y, Tensor) else None
    floats = x.is_floating_point() or (
        given.is_floating_point() if given is not None else isinstance(y, float)
    )
    if floats:
        return NotImplemented
    del whole
    rest = torch.fmod(x, y)
    other = torch.logical_and(torch.ne(rest, 0), torch.ne(torch.lt(rest, 0), _is_negative(rest, y)))
    return torch.where(other, rest + y, rest)


def _is_negative(like: Tensor, y: Any) -> Tensor:
    return (
        torch.lt(y, 0) if isinstance(y, Tensor) else torch.full_like(like, y < 0, dtype=torch.bool)
    )


def bilinear(
    whole: Callable[..., Tensor],
    x: Tensor,
    output_size: Sequence[int] | None,
    align_corners: bool,
    scale_factors: Sequence[float] | None,
) -> Tensor:
    """A resize by a factor that the sizes do not say; XNNPACK reads the sizes alone."""
    if scale_factors is None:
        return NotImplemented
    exact = all(
        math.isclose(size * factor, math.floor(size * factor))
        for size, factor in zip(x.shape[2:], scale_factors, strict=True)
    )
    if exact or align_corners:
        sizes = [
            math.floor(size * factor)
            for size, factor in zip(x.shape[2:], scale_factors, strict=True)
        ]
        return whole(x, sizes, align_corners, None)
    rule = decomposition_table[torch.ops.aten.upsample_bilinear2d.vec]
    return rule(x, output_size, align_corners, scale_factors)


def convolution(
    whole: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """A convolution of volumes, which has no kernel, as the sum of those of its layers."""
    if weight.ndim != 5:
        return NotImplemented
    if transposed:
        return products.conv_transpose(
            x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
        )
    step, pad, apart = (_thrice(each) for each in (stride, padding, dilation))
    x = torch.constant_pad_nd(x, [0, 0, 0, 0, pad[0], pad[0]])
    batch, depth = x.shape[0], (x.shape[2] - apart[0] * (weight.shape[2] - 1) - 1) // step[0] + 1
    total = None
    for layer in range(weight.shape[2]):
        first = layer * apart[0]
        part = x[:, :, first : first + (depth - 1) * step[0] + 1 : step[0]].transpose(1, 2)
        images = part.reshape(batch * depth, *part.shape[2:])
        behind = (step[1:], pad[1:], apart[1:], False, [0, 0], groups)
        made = whole(images, weight[:, :, layer], bias if layer == 0 else None, *behind)
        total = made if total is None else total + made
    assert total is not None
    # as the whole one lies in memory: views behind it were traced of that
    return total.reshape(batch, depth, *total.shape[1:]).transpose(1, 2).contiguous()


def _thrice(value: Any) -> list[int]:
    listed = [value] if isinstance(value, int) else list(value)
    return listed * 3 if len(listed) == 1 else listed


def average_volumes(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Averages over layers, and of those over depth."""
    behind = (stride, padding, ceil_mode, count_include_pad, divisor_override)
    cut = pooling.avg_pool(3, x, kernel_size, *behind)
    if isinstance(cut, Tensor):
        return cut
    kernel, pad = _thrice(kernel_size), _thrice(padding)
    step = _thrice(stride) if stride else kernel
    lead, sizes = x.shape[:-3], x.shape[-3:]
    pool = torch.nn.functional.avg_pool2d
    layers = pool(x.reshape(-1, *sizes), kernel[1:], step[1:], pad[1:], False, count_include_pad)
    rows = layers.flatten(2)
    over = pool(rows, (kernel[0], 1), (step[0], 1), (pad[0], 0), False, count_include_pad)
    return over.reshape(*lead, over.shape[1], *layers.shape[2:])
