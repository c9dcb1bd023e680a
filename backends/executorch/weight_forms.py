"""Forms of quantized weights that XNNPACK and portable kernels can hold."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphopt.analysis.quantized import quantized_ops
from graphopt.analysis.stored_values import QuantizedTensor
from graphopt.backends.executorch.kernels import (
    LINEAR,
    LOOKUPS,
    is_fused_activation,
    takes_integers,
)
from graphopt.ir import op_info
from graphopt.ir.editor import Editor
from graphopt.ir.op_info import WeightSlot
from graphopt.ir.ops import STORAGE_BITS

__all__ = [
    "DEQUANTIZE",
    "PACKED",
    "QUANTIZE",
    "bias_apart",
    "bias_place",
    "is_packed",
    "is_rounded",
    "only_user",
    "store_weight",
    "why_not_integers",
]

_aten = torch.ops.aten
_ours = torch.ops.graphopt
QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"
# ops whose weight may be computed when the program runs
_TAKES_ROWS = LINEAR | LOOKUPS
_TABLE = _ours.lut_to_dense.default
PACKED = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (2, 3, 4, 6, 8))


def is_packed(weight: fx.Node) -> bool:
    """Whether codes of a `shift_scale` weight are smaller than what XNNPACK can hold of it.

    Weights that kernels compute with stay integers, and so do those of eight bits whose rows are
    dequantized when the program runs; integers of a table are decoded with it.
    """
    if any(
        reader.target is _TABLE or not why_not_integers(weight, reader) for reader in weight.users
    ):
        return False
    narrow = STORAGE_BITS[str(weight.args[3])] < 8
    return narrow or any(reader.target not in _TAKES_ROWS for reader in weight.users)


def is_rounded(node: object) -> bool:
    """Whether a value is a dequantized activation."""
    if not isinstance(node, fx.Node) or str(node.target) != DEQUANTIZE:
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and source.op != "get_attr"


def only_user(node: fx.Node) -> fx.Node | None:
    """The one reader of a value, or None where there are several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def store_weight(edit: Editor, weight: QuantizedTensor) -> None:
    """Replace one `shift_scale` weight, for each op that reads it, by what XNNPACK can hold."""
    for reader in list(weight.node.users):
        reason = _why_not_int8(edit, weight, reader)
        if not reason:
            edit.substitute(reader, weight.node, _int8(edit, weight, reader))
        elif reader.target in _TAKES_ROWS and _has_rows(weight) and _is_float32(weight):
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


def _elements(edit: Editor, weight: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Elements as int8 with the weight's shape; scale and zero point, shape `counts`."""
    data, scale, offset, storage, shape, _ = weight.node.args
    assert isinstance(data, fx.Node)
    ones = torch.ones([1] * len(weight.shape))
    stored = _ours.shift_scale.default(edit.value(data), ones, None, storage, shape, torch.float32)
    zero = torch.zeros(weight.counts)
    if isinstance(offset, fx.Node):
        zero = edit.value(offset).to(torch.float32)
    if str(storage).startswith("u"):
        middle = 128 if storage == "uint8" else 0
        stored, zero = stored - middle, zero - middle
    assert isinstance(scale, fx.Node)
    return stored.to(torch.int8), edit.value(scale).to(torch.float32), zero


def why_not_integers(weight: fx.Node, reader: fx.Node) -> str:
    """Why the activations around an op keep XNNPACK from computing it with integers, or ""."""
    if not takes_integers(reader):
        return f"{str(reader.target).split('.')[1]} takes float weights"
    slot = _weight_slot(reader)
    if reader.args[slot.position] is not weight:
        return "it is no weight operand"
    x = reader.args[slot.data]
    padded = op_info.info_of(x) if isinstance(x, fx.Node) else None
    if padded is not None and padded.fill is not None:
        x = x.args[0]  # type: ignore[union-attr]
    if not is_rounded(x):
        return "its op reads a float activation"
    result: fx.Node | None = reader
    user = only_user(reader)
    if user is not None and is_fused_activation(user):
        result = user
    behind = None if result is None else only_user(result)
    if behind is None or str(behind.target) != QUANTIZE:
        return "its op's output is not quantized"
    return ""


def bias_place(op: fx.Node) -> int:
    """Place of the bias among the arguments of a convolution or a linear layer."""
    place = _weight_slot(op).bias
    assert place is not None
    return place


def _weight_slot(op: fx.Node) -> WeightSlot:
    info = op_info.info_of(op)
    assert info is not None
    return info.weights[0]


def _is_transposed_in_groups(op: fx.Node) -> bool:
    info = op_info.info_of(op)
    places = None if info is None else info.convolution
    if places is None or not places.transposed:
        return False
    return bool(op_info.argument(op, places.groups, 1) != 1)


def _why_not_int8(edit: Editor, weight: QuantizedTensor, reader: fx.Node) -> str:
    """Why XNNPACK cannot compute with the integers themselves, or ""."""
    reason = why_not_integers(weight.node, reader)
    if reason:
        return reason
    if not weight.per_channel:
        return "scales run over blocks"
    axes = [axis for axis, count in enumerate(weight.counts) if count > 1]
    if axes and axes != [_weight_slot(reader).channel_axis]:
        return f"scales run along axis {axes[0]}"
    if axes and _is_transposed_in_groups(reader):
        return "a transposed convolution in groups has one scale"
    if weight.offset == "minimum" or bool(_elements(edit, weight)[2].any()):
        return "weights have zero points"
    return ""


def _int8(edit: Editor, weight: QuantizedTensor, reader: fx.Node) -> fx.Node:
    ops = quantized_ops()
    stored, scale, _ = _elements(edit, weight)
    limits = (-128, 127, torch.int8)
    like = weight.node
    data = edit.constant(f"{weight.name}_int8", stored.contiguous(), like=like, before=reader)
    axes = [axis for axis, count in enumerate(weight.counts) if count > 1]
    if not axes:
        return edit.call(
            ops.dequantize_per_tensor.default,
            data,
            float(scale),
            0,
            *limits,
            like=like,
            before=reader,
        )
    flat = scale.reshape(-1).clone()
    factors = edit.constant(f"{weight.name}_scales", flat, like=like, before=reader)
    zeros = torch.zeros(flat.numel(), dtype=torch.int64)
    zero = edit.constant(f"{weight.name}_zeros", zeros, like=like, before=reader)
    return edit.call(
        ops.dequantize_per_channel.default,
        data,
        factors,
        zero,
        axes[0],
        *limits,
        like=like,
        before=reader,
    )


def _is_float32(weight: QuantizedTensor) -> bool:
    value = weight.node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _has_rows(weight: QuantizedTensor) -> bool:
    """Whether the scales belong to runs of consecutive elements, and offsets are integers."""
    whole = len(weight.shape) == 2 and weight.offset != "minimum"
    return whole and (weight.counts[0] == weight.shape[0] or weight.counts == (1, 1))


def _rows(edit: Editor, weight: QuantizedTensor, reader: fx.Node) -> fx.Node:
    """Dequantize runs of elements as the rows of a matrix, which the portable kernel can."""
    ops = quantized_ops()
    stored, scale, zero = _elements(edit, weight)
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
