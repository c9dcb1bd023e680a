"""Forms of quantized weights that XNNPACK and portable kernels can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.quantized import quantized_ops
from graphopt.analysis.stored_values import QuantizedTensor
from graphopt.backends.executorch.dynamic import reads_rows_by_range
from graphopt.backends.executorch.integer_kernels import (
    TAKES_ROWS,
    ZEROS,
    computes_with_integers,
    elements_of,
    is_float32,
    kernel_bits,
    weight_slot,
    why_no_kernel,
)
from graphopt.backends.executorch.kernels import LINEAR
from graphopt.ir import op_info
from graphopt.ir.editor import Editor

__all__ = ["bias_apart", "bias_place", "store_weight"]

_aten = torch.ops.aten
_ours = torch.ops.graphopt


def store_weight(edit: Editor, weight: QuantizedTensor) -> None:
    """Replace one `shift_scale` weight, for each op that reads it, by what XNNPACK can hold."""
    for reader in list(weight.node.users):
        reason = why_no_kernel(weight, reader)
        if not reason:
            edit.substitute(reader, weight.node, _for_kernel(edit, weight, reader))
            if reader.target in LINEAR and not (
                computes_with_integers(reader) or reads_rows_by_range(reader)
            ):
                bias_apart(edit, reader)
        elif reader.target in TAKES_ROWS and _has_rows(weight) and is_float32(weight):
            edit.substitute(reader, weight.node, _rows(edit, weight, reader))
            if reader.target in LINEAR:
                bias_apart(edit, reader)
            edit.note(f"{weight.name}: dequantized when the program runs ({reason})")
        else:
            dense = _dense(edit, weight)
            made = edit.constant(f"{weight.name}_dense", dense, like=weight.node, before=reader)
            edit.substitute(reader, weight.node, made)
            kind = str(dense.dtype).removeprefix("torch.")
            edit.note(f"{weight.name}: stored as {kind} ({reason})")


def bias_apart(edit: Editor, linear: fx.Node) -> None:
    """Add a bias behind the layer: XNNPACK crashes on one beside a weight computed at run time."""
    place = bias_place(linear)
    bias = op_info.argument(linear, place)
    if not isinstance(bias, fx.Node):
        return
    product = edit.call(_aten.linear.default, *linear.args[:place], like=linear)
    edit.replace(linear, edit.call(_aten.add.Tensor, product, bias, like=linear))


def _dense(edit: Editor, weight: QuantizedTensor) -> Tensor:
    arguments = [
        edit.value(given) if isinstance(given, fx.Node) else given for given in weight.node.args
    ]
    with torch.no_grad():
        return _ours.shift_scale.default(*arguments).clone()


def bias_place(op: fx.Node) -> int:
    """Place of the bias among the arguments of a convolution or a linear layer."""
    place = weight_slot(op).bias
    assert place is not None
    return place


def _for_kernel(edit: Editor, weight: QuantizedTensor, reader: fx.Node) -> fx.Node:
    ops = quantized_ops()
    stored, scale, _ = elements_of(weight)
    like, static = weight.node, computes_with_integers(reader)
    largest = 2 ** (kernel_bits(weight, reader) - 1)
    limits = (-largest, largest - 1, torch.int8)
    data = edit.constant(f"{weight.name}_int8", stored.contiguous(), like=like, before=reader)
    axes = [axis for axis, count in enumerate(weight.counts) if count > 1]
    place: Any = {"like": like, "before": reader}
    if static and not axes:
        return edit.call(ops.dequantize_per_tensor.default, data, float(scale), 0, *limits, **place)
    axis = axes[0] if axes else 0
    if weight.per_channel:
        scale = scale.reshape(-1).expand(int(weight.shape[axis])).clone()
    factors = edit.constant(f"{weight.name}_scales", scale, **place)
    none = torch.zeros(scale.shape, dtype=torch.int64)
    given = (data, factors, edit.constant(f"{weight.name}{ZEROS}", none, **place))
    if weight.per_channel:
        return edit.call(ops.dequantize_per_channel.default, *given, axis, *limits, **place)
    rest = (*limits, int(weight.shape[1]) // int(weight.counts[1]), torch.float32)
    return edit.call(ops.dequantize_per_channel_group.default, *given, *rest, **place)


def _has_rows(weight: QuantizedTensor) -> bool:
    """Whether the scales belong to runs of consecutive elements, and offsets are integers."""
    whole = len(weight.shape) == 2 and weight.offset != "minimum"
    return whole and (weight.counts[0] == weight.shape[0] or weight.counts == (1, 1))


def _rows(edit: Editor, weight: QuantizedTensor, reader: fx.Node) -> fx.Node:
    """Dequantize runs of elements as the rows of a matrix, which the portable kernel can."""
    ops = quantized_ops()
    stored, scale, zero = elements_of(weight)
    outputs, inputs = weight.shape
    counts = (outputs, weight.counts[1])
    runs = stored.reshape(outputs * counts[1], inputs // counts[1]).contiguous()
    like = weight.node
    data = edit.constant(f"{weight.name}_rows", runs, like=like, before=reader)
    factors = edit.constant(
        f"{weight.name}_row_scales",
        scale.expand(counts).reshape(-1).clone(),
        like=like,
        before=reader,
    )
    points = edit.constant(
        f"{weight.name}_row_zeros",
        zero.expand(counts).reshape(-1).to(torch.int64),
        like=like,
        before=reader,
    )
    dense = edit.call(
        ops.dequantize_per_channel.default,
        data,
        factors,
        points,
        0,
        -128,
        127,
        torch.int8,
        like=like,
        before=reader,
    )
    if counts[1] == 1:
        return dense
    return edit.call(_aten.view.default, dense, [outputs, inputs], like=like, before=reader)
