"""Compute convolutions whose weight is decoded at run time as linear layers, which delegates take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.analysis.stored_values import quantized_at
from graphopt.backends.executorch.kernels import CONVOLUTIONS
from graphopt.backends.executorch.weight_forms import bias_apart
from graphopt.ir import op_info
from graphopt.ir.editor import Editor
from graphopt.ir.op_info import OpInfo
from graphopt.passes.pass_base import Pass

__all__ = ["ConvolutionsAsLinear"]

_aten = torch.ops.aten
_END = 2**63 - 1


@dataclass(frozen=True)
class ConvolutionsAsLinear(Pass):
    """Rewrite 2-D convolutions of batches, not in groups, that read a computed weight.

    Before:
        %y = conv2d(%x, %w, %b, stride, padding, dilation)      # %w is no constant

    After:
        %p = constant_pad_nd(%x, …)
        %c = cat([slice(%p, …) for each place of the kernel], 1)
        %l = linear(permute(%c, [0, 2, 3, 1]), view(permute(%w, [0, 2, 3, 1]), [out, −1]), %b)
        %y = clone(permute(%l, [0, 3, 1, 2]))

    XNNPACK computes linear layers with weights of run time, and no convolutions; the portable kernel
    of convolutions is some twenty times slower than that of linear layers. The price is a copy of the
    input per place of the kernel.
    """

    name: ClassVar[str] = "convolutions-as-linear"
    tolerance: ClassVar[float | None] = 1e-5

    @override
    def run(self, edit: Editor) -> None:
        for conv in edit.calls(*CONVOLUTIONS):
            info = op_info.info_of(conv)
            assert info is not None
            weight = conv.args[info.weights[0].position]
            if isinstance(weight, fx.Node) and _is_plain(conv, info) and _is_decoded(weight):
                _rewrite(edit, conv, weight)


def _is_plain(conv: fx.Node, info: OpInfo) -> bool:
    """Whether it is a 2-D convolution of a batch, not transposed, not in groups."""
    places, value = info.convolution, conv.meta.get("val")
    if places is None or places.transposed or places.ndim != 2:
        return False
    if not isinstance(value, Tensor) or value.ndim != 4:
        return False
    padding = op_info.argument(conv, places.padding, 0)
    return not isinstance(padding, str) and op_info.argument(conv, places.groups, 1) == 1


def _is_decoded(weight: fx.Node) -> bool:
    """Whether it is computed when the program runs, and no integers that become a constant yet."""
    if weight.op != "call_function" or quantized_at(weight) is not None:
        return False
    return not str(weight.target).startswith("quantized_decomposed.")


def _pair(value: Any) -> tuple[int, int]:
    listed = list(value) if isinstance(value, list | tuple) else [value]
    return (int(listed[0]), int(listed[-1]))


def _rewrite(edit: Editor, conv: fx.Node, weight: fx.Node) -> None:
    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return edit.call(target, *args, like=conv, **kwargs)

    info = op_info.info_of(conv)
    assert info is not None
    assert info.convolution is not None
    places, slot = info.convolution, info.weights[0]
    x = conv.args[slot.data]
    stride = _pair(op_info.argument(conv, places.stride, 1))
    padding = _pair(op_info.argument(conv, places.padding, 0))
    dilation = _pair(op_info.argument(conv, places.dilation, 1))
    value = weight.meta["val"]
    assert isinstance(value, Tensor)
    outputs, _, height, width = (int(size) for size in value.shape)
    if any(padding):
        vertical, horizontal = padding
        x = call(_aten.constant_pad_nd.default, x, [horizontal, horizontal, vertical, vertical])
    rows = [_slice(call, x, 2, row, height, stride[0], dilation[0]) for row in range(height)]
    read = [
        _slice(call, row, 3, column, width, stride[1], dilation[1])
        for row in rows
        for column in range(width)
    ]
    joined = read[0] if len(read) == 1 else call(_aten.cat.default, read, 1)
    last = call(_aten.permute.default, joined, [0, 2, 3, 1])
    flat = call(_aten.permute.default, weight, [0, 2, 3, 1])
    if height * width > 1:
        flat = _contiguous(call, flat)
    matrix = call(_aten.view.default, flat, [outputs, -1])
    bias = op_info.argument(conv, slot.bias)
    linear = call(_aten.linear.default, last, matrix, *(() if bias is None else (bias,)))
    channels_first = call(_aten.permute.default, linear, [0, 3, 1, 2])
    edit.replace(conv, _contiguous(call, channels_first))
    bias_apart(edit, linear)


def _contiguous(call: Any, x: fx.Node) -> fx.Node:
    """In the order of its axes, as readers had it: some export to other ops for other strides."""
    copied: fx.Node = call(_aten.clone.default, x, memory_format=torch.contiguous_format)
    return copied


def _slice(call: Any, x: Any, axis: int, place: int, size: int, stride: int, dilation: int) -> Any:
    """What one place of the kernel reads along an axis; ends count from behind, sizes stay open."""
    if size == 1 and stride == 1:
        return x
    rest = (size - 1 - place) * dilation
    return call(_aten.slice.Tensor, x, axis, place * dilation, -rest if rest else _END, stride)
