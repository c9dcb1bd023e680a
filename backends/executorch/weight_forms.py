"""Forms of quantized weights that XNNPACK and portable kernels can hold."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphopt.analysis.quantized import quantized_ops
from graphopt.analysis.stored_values import QuantizedTensor
from graphopt.ir.editor import Editor

__all__ = [
    "CONVOLUTIONS",
    "DEQUANTIZE",
    "QUANTIZE",
    "TRANSPOSED",
    "bias_apart",
    "is_rounded",
    "only_user",
    "store_weight",
    "why_not_integers",
]

_aten = torch.ops.aten
_ours = torch.ops.graphopt
QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"
CONVOLUTIONS = {
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv1d.padding, _aten.conv2d.padding),
}
TRANSPOSED = {_aten.conv_transpose1d.default, _aten.conv_transpose2d.input}
_GROUPS = 6  # argument of a transposed convolution
_FUSED = {_aten.relu.default, _aten.hardtanh.default, _aten.relu6.default}
# ops whose weight may be computed when the program runs
_TAKES_ROWS = {_aten.linear.default, _aten.embedding.default}


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
            if reader.target is _aten.linear.default:
                bias_apart(edit, reader)
            _note(edit, f"{weight.name}: dequantized when the program runs ({reason})")
        else:
            dense = _dense(edit, weight)
            made = edit.constant(f"{weight.name}_dense", dense, like=weight.node, before=reader)
            edit.substitute(reader, weight.node, made)
            kind = str(dense.dtype).removeprefix("torch.")
            _note(edit, f"{weight.name}: stored as {kind} ({reason})")


def bias_apart(edit: Editor, linear: fx.Node) -> None:
    """Add a bias behind the layer: XNNPACK crashes on one beside a weight computed at run time."""
    bias = linear.args[2] if len(linear.args) > 2 else None
    if not isinstance(bias, fx.Node):
        return
    product = edit.call(_aten.linear.default, *linear.args[:2], like=linear)
    edit.replace(linear, edit.call(_aten.add.Tensor, product, bias, like=linear))


def _note(edit: Editor, text: str) -> None:
    edit.note(text)


def _dense(edit: Editor, weight: QuantizedTensor) -> Tensor:
    arguments = [
        edit.value(each) if isinstance(each, fx.Node) else each for each in weight.node.args
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
    known = reader.target in CONVOLUTIONS or reader.target in TRANSPOSED
    if not known and reader.target is not _aten.linear.default:
        return f"{str(reader.target).split('.')[1]} takes float weights"
    if reader.args[1] is not weight:
        return "it is no weight operand"
    x = reader.args[0]
    if isinstance(x, fx.Node) and x.target is _aten.constant_pad_nd.default:
        x = x.args[0]
    if not is_rounded(x):
        return "its op reads a float activation"
    result: fx.Node | None = reader
    user = only_user(reader)
    if user is not None and user.target in _FUSED:
        result = user
    behind = None if result is None else only_user(result)
    if behind is None or str(behind.target) != QUANTIZE:
        return "its op's output is not quantized"
    return ""


def _why_not_int8(edit: Editor, weight: QuantizedTensor, reader: fx.Node) -> str:
    """Why XNNPACK cannot compute with the integers themselves, or ""."""
    reason = why_not_integers(weight.node, reader)
    if reason:
        return reason
    if not weight.per_channel:
        return "scales run over blocks"
    axes = [axis for axis, count in enumerate(weight.counts) if count > 1]
    wanted = 1 if reader.target in TRANSPOSED else 0
    if axes and axes != [wanted]:
        return f"scales run along axis {axes[0]}"
    groups = reader.args[_GROUPS] if len(reader.args) > _GROUPS else 1
    if reader.target in TRANSPOSED and axes and groups != 1:
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
