"""Rewrite quantized programs, exactly, into the forms that XNNPACK computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.editor import Editor
from graphopt.pass_base import Pass
from graphopt.passes import DequantizeToShiftScale
from graphopt.quantized import QuantizedTensor, find_quantized_weights, quantized_ops

__all__ = ["DuplicateDequantize", "LegalizeForXNNPACK", "bias_apart", "why_not_integers"]

_aten = torch.ops.aten
_ours = torch.ops.graphopt
_QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
_DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"
_CONVS = {
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv1d.padding, _aten.conv2d.padding),
}
_TRANSPOSED = {_aten.conv_transpose1d.default, _aten.conv_transpose2d.input}
_GROUPS = 6  # argument of a transposed convolution
_FUSED = {_aten.relu.default, _aten.hardtanh.default, _aten.relu6.default}
# ops whose weight may be computed when the program runs
_TAKES_ROWS = {_aten.linear.default, _aten.embedding.default}
# rounding what these give with the scale of what they read changes nothing
_LAYOUT = {
    *(_aten.max_pool2d.default, _aten.view.default, _aten.reshape.default, _aten.permute.default),
    *(_aten.flatten.using_ints, _aten.transpose.int, _aten.squeeze.dim, _aten.squeeze.dims),
    *(_aten.unsqueeze.default, _aten.slice.Tensor, _aten.relu.default, _aten.clone.default),
    *(_aten._unsafe_view.default, _aten.upsample_nearest2d.vec, _aten.pixel_shuffle.default),
    *(_aten.expand.default, _aten.constant_pad_nd.default),
}


@dataclass(frozen=True)
class LegalizeForXNNPACK(Pass):
    """Bring activations to int8, operands of `cat` to one scale, and weights to a form it holds.

    Before:
        %q = quantize_per_tensor(%x, s, 128, 0, 255, uint8)
        %m = mean(%d, [2, 3])

    After:
        %q = quantize_per_tensor(%x, s, 0, −128, 127, int8)
        %k = mean(%d, [2, 3], True)
        %m = view(%k, [−1, channels])

    XNNPACK drops the limits of an activation's range and the zero points of weights, so a narrower
    range becomes a clamp, and a weight with zero points float. A weight that it cannot compute with
    as int8 stays int8 for linear layers and embeddings (dequantized when the program runs) and is
    float32 else.
    """

    name: ClassVar[str] = "legalize-for-xnnpack"
    after: ClassVar[tuple[type[Pass], ...]] = (DequantizeToShiftScale,)

    @override
    def run(self, edit: Editor) -> None:
        quantized_ops()
        for node in list(edit.gm.graph.nodes):
            if "_assert" in str(node.target) and not node.users:
                edit.erase(node)
        for node in edit.calls(_aten.mean.dim):
            _keep_dims(edit, node)
        for node in edit.calls(_aten.clamp.default):
            if _is_hardtanh(node):
                edit.replace(node, edit.call(_aten.hardtanh.default, *node.args, like=node))
        _to_int8(edit)
        for node in edit.calls(_aten.cat.default):
            _one_scale(edit, node)
        for node in edit.calls(*_LAYOUT):
            _round_again(edit, node)
        for weight in find_quantized_weights(edit.gm):
            _weight(edit, weight)
        for node in edit.calls(*_CONVS, *_TRANSPOSED, _aten.linear.default):
            _own_bias(edit, node)
        _own_outputs(edit)


@dataclass(frozen=True)
class DuplicateDequantize(Pass):
    """Give every reader of a dequantized value a dequantize op of its own.

    Before:
        %d = dequantize_per_tensor(%q, …)
        %y = conv2d(%d, …)
        %z = add(%d, …)

    After:
        %d0 = dequantize_per_tensor(%q, …)
        %d1 = dequantize_per_tensor(%q, …)
    """

    name: ClassVar[str] = "duplicate-dequantize"

    @override
    def run(self, edit: Editor) -> None:
        for node in list(edit.gm.graph.nodes):
            if not str(node.target).startswith("quantized_decomposed.dequantize_per_"):
                continue
            for reader in list(node.users)[1:]:
                copied = edit.call(node.target, *node.args, like=node, **node.kwargs)
                reader.replace_input_with(node, copied)


def _is_rounded(node: object) -> bool:
    """Whether a value is a dequantized activation."""
    if not isinstance(node, fx.Node) or str(node.target) != _DEQUANTIZE:
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and source.op != "get_attr"


def _is_hardtanh(clamp: fx.Node) -> bool:
    """Whether a clamp has the type of its input and both ends, the lower one first."""
    value = clamp.args[0].meta.get("val") if isinstance(clamp.args[0], fx.Node) else None
    ends = clamp.args[1:3]
    if not isinstance(value, Tensor) or not value.is_floating_point() or len(ends) != 2:
        return False
    low, high = ends
    return isinstance(low, int | float) and isinstance(high, int | float) and low < high


def _own_bias(edit: Editor, node: fx.Node) -> None:
    """A bias of its own for each op that computes with integers: XNNPACK scales one only once."""
    bias = node.args[2] if len(node.args) > 2 else None
    if not isinstance(bias, fx.Node) or bias.op != "get_attr" or not _is_rounded(node.args[0]):
        return
    readers = [
        reader for each in edit.constants() if each.target == bias.target for reader in each.users
    ]
    if len(readers) > 1:
        copied = edit.constant(
            f"{bias.target}_of_{node.name}", edit.value(bias).detach().clone(), like=node
        )
        edit.set_args(node, (*node.args[:2], copied, *node.args[3:]))


def _own_outputs(edit: Editor) -> None:
    """Constants that are outputs apart from those that ops read, which delegates take with them."""
    for output in edit.gm.graph.find_nodes(op="output"):
        for constant in edit.constants():
            if output in constant.users and len(constant.users) > 1:
                value = edit.value(constant).detach().clone()
                copied = edit.constant(
                    f"{constant.target}_out", value, like=constant, before=output
                )
                edit.substitute(output, constant, copied)


def _scale_of(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.args[1:])


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _keep_dims(edit: Editor, node: fx.Node) -> None:
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    dims = node.args[1] if len(node.args) > 1 else None
    if not isinstance(value, Tensor) or value.ndim != 4 or not isinstance(dims, list | tuple):
        return
    if (len(node.args) > 2 and node.args[2]) or node.kwargs:
        return
    if sorted(int(dim) % 4 for dim in dims) != [2, 3]:
        return
    kept = edit.call(_aten.mean.dim, source, dims, True, like=node)
    flat = edit.call(_aten.view.default, kept, [-1, int(value.shape[1])], like=node)
    edit.replace(node, flat)


def _to_int8(edit: Editor) -> None:
    """uint8 to int8 by moving the zero point; narrower ranges to a clamp before rounding."""
    ops = quantized_ops()
    for node in list(edit.gm.graph.nodes):
        target = str(node.target)
        if target not in (_QUANTIZE, _DEQUANTIZE) or (
            target == _DEQUANTIZE and not _is_rounded(node)
        ):
            continue
        x, scale, zero, low, high, kind = node.args
        if kind is torch.uint8:
            zero, low, high = zero - 128, low - 128, high - 128
        if (low, high, kind) == (-128, 127, torch.int8):
            continue
        limits = (scale, zero, -128, 127, torch.int8)
        if target == _DEQUANTIZE:
            made = edit.call(
                ops.dequantize_per_tensor.default, x, *limits, like=node, **node.kwargs
            )
        else:
            if (low, high) != (-128, 127):
                ends = ((low - zero) * scale, (high - zero) * scale)
                x = edit.call(_aten.hardtanh.default, x, *ends, like=node)
            made = edit.call(ops.quantize_per_tensor.default, x, *limits, like=node)
        edit.replace(node, made)


def _pair(edit: Editor, value: fx.Node, scale: tuple[Any, ...], before: fx.Node) -> fx.Node:
    ops = quantized_ops()
    stored = edit.call(ops.quantize_per_tensor.default, value, *scale, like=value, before=before)
    return edit.call(ops.dequantize_per_tensor.default, stored, *scale, like=value, before=before)


def _items(argument: object) -> list[fx.Node]:
    listed = argument if isinstance(argument, list | tuple) else []
    return [item for item in listed if isinstance(item, fx.Node)]


def _one_scale(edit: Editor, node: fx.Node) -> None:
    items = [item for item in _items(node.args[0]) if _is_rounded(item)]
    user = _only_user(node)
    if len(items) != len(_items(node.args[0])) or user is None or str(user.target) != _QUANTIZE:
        return
    wanted = _scale_of(user)
    made = [
        item if _scale_of(item) == wanted else _pair(edit, item, wanted, node) for item in items
    ]
    edit.set_args(node, (made, *node.args[1:]))


def _round_again(edit: Editor, node: fx.Node) -> None:
    source = node.args[0]
    if not isinstance(source, fx.Node) or not _is_rounded(source):
        return
    scale = _scale_of(source)
    fill = node.args[2] if len(node.args) > 2 else 0
    if node.target is _aten.constant_pad_nd.default and fill not in (0, 0.0, None):
        return
    user = _only_user(node)
    if user is not None and str(user.target) == _QUANTIZE and _scale_of(user) == scale:
        return
    if all(reader.op == "output" for reader in node.users):
        return
    readers = set(node.users)
    rounded = _pair(edit, node, scale, node.next)
    edit.redirect(node, rounded, lambda reader: reader not in readers)


def _weight(edit: Editor, weight: QuantizedTensor) -> None:
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
    edit.gm.meta["graphopt.notes"] = (*edit.gm.meta.get("graphopt.notes", ()), text)


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
    known = reader.target in _CONVS or reader.target in _TRANSPOSED
    if not known and reader.target is not _aten.linear.default:
        return f"{str(reader.target).split('.')[1]} takes float weights"
    if reader.args[1] is not weight:
        return "it is no weight operand"
    x = reader.args[0]
    if isinstance(x, fx.Node) and x.target is _aten.constant_pad_nd.default:
        x = x.args[0]
    if not _is_rounded(x):
        return "its op reads a float activation"
    result: fx.Node | None = reader
    user = _only_user(reader)
    if user is not None and user.target in _FUSED:
        result = user
    behind = None if result is None else _only_user(result)
    if behind is None or str(behind.target) != _QUANTIZE:
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
    wanted = 1 if reader.target in _TRANSPOSED else 0
    if axes and axes != [wanted]:
        return f"scales run along axis {axes[0]}"
    groups = reader.args[_GROUPS] if len(reader.args) > _GROUPS else 1
    if reader.target in _TRANSPOSED and axes and groups != 1:
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
            ops.dequantize_per_tensor.default, data, float(scale), 0, *limits, like=like,
            before=reader,
        )  # fmt: skip
    flat = scale.reshape(-1).clone()
    factors = edit.constant(f"{weight.name}_scales", flat, like=like, before=reader)
    zeros = torch.zeros(flat.numel(), dtype=torch.int64)
    zero = edit.constant(f"{weight.name}_zeros", zeros, like=like, before=reader)
    return edit.call(
        ops.dequantize_per_channel.default, data, factors, zero, axes[0], *limits, like=like,
        before=reader,
    )  # fmt: skip


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
        f"{weight.name}_row_scales", scale.expand(counts).reshape(-1).clone(), like=like,
        before=reader,
    )  # fmt: skip
    points = edit.constant(
        f"{weight.name}_row_zeros", zero.expand(counts).reshape(-1).to(torch.int64), like=like,
        before=reader,
    )  # fmt: skip
    dense = edit.call(
        ops.dequantize_per_channel.default, data, factors, points, 0, -128, 127, torch.int8,
        like=like, before=reader,
    )  # fmt: skip
    if counts[1] == 1:
        return dense
    return edit.call(_aten.view.default, dense, [outputs, inputs], like=like, before=reader)
