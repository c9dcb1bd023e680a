"""Constants in the form that XNNPACK's own rewrites need: computed ahead, and read by one op each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.backends.executorch.integer_kernels import is_rounded
from graphopt.backends.executorch.kernels import CONVOLUTIONS, LINEAR
from graphopt.backends.executorch.weight_forms import bias_apart
from graphopt.ir import op_info
from graphopt.ir.editor import Editor, operands
from graphopt.passes.expand_tables import drop_unread
from graphopt.passes.pass_base import Pass
from graphopt.run.interpreter import constant_value

__all__ = ["ComputeWeights", "Conv1dAsConv2d", "OwnNormState"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class ComputeWeights(Pass):
    """Compute weights and biases that follow from constants, where that makes the file no larger.

    Before:
        %w = mul(%v, %g)
        %y = linear(%x, %w, %b)

    After:
        %w = get_attr[w]
        %y = linear(%x, %w, %b)

    What is decoded from codes or integers stays. The bias beside a weight that is still computed when
    the program runs is added behind: XNNPACK crashes on it.
    """

    name: ClassVar[str] = "compute-weights"

    @override
    def run(self, edit: Editor) -> None:
        for node in edit.calls(*CONVOLUTIONS, *LINEAR):
            info = op_info.info_of(node)
            assert info is not None
            slot = info.weights[0]
            for place in (slot.position, slot.bias):
                operand = op_info.argument(node, place)
                if isinstance(operand, fx.Node) and _is_smaller(edit, operand):
                    _compute(edit, operand)
            weight = node.args[slot.position]
            if node.target in LINEAR and isinstance(weight, fx.Node) and _is_computed(weight):
                bias_apart(edit, node)


def _is_computed(weight: fx.Node) -> bool:
    if weight.op == "call_function" and "dequantize_per" in str(weight.target):
        weight = operands(weight)[0]
    return weight.op == "call_function"


def _is_smaller(edit: Editor, operand: fx.Node) -> bool:
    """Whether a value is computed from constants that take at least its own bytes."""
    value = operand.meta.get("val")
    if operand.op != "call_function" or not isinstance(value, Tensor):
        return False
    sources = _constants_of(operand)
    if sources is None or any(not isinstance(size, int) for size in value.shape):
        return False
    held = {str(node.target): edit.value(node) for node in sources}
    given = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    return value.numel() * value.element_size() <= given


def _is_written(constant: fx.Node) -> bool:
    return any(
        bool(getattr(getattr(reader.target, "_schema", None), "is_mutable", False))
        for reader in constant.users
    )


def _constants_of(node: fx.Node) -> list[fx.Node] | None:
    """What a value is computed from, if constants alone."""
    found, waiting, seen = [], [node], {node}
    while waiting:
        current = waiting.pop()
        if current.op == "get_attr":
            if _is_written(current):
                return None
            found.append(current)
        elif current.op != "call_function":
            return None
        for used in operands(current):
            if used not in seen:
                seen.add(used)
                waiting.append(used)
    return found or None


def _compute(edit: Editor, operand: fx.Node) -> None:
    with torch.no_grad():
        value = constant_value(edit.gm, operand).contiguous().clone()
    made = edit.constant(operand.name, value, like=operand)
    read = operands(operand)
    edit.replace(operand, made)
    drop_unread(edit, read)


@dataclass(frozen=True)
class OwnNormState(Pass):
    """Give each batch norm, and the layer that it is folded into, constants of their own.

    Before:
        %y = conv2d(%a, %w)
        %z = conv2d(%b, %w)
        %m = batch_norm(%y, …)
        %n = batch_norm(%z, …)

    After:
        %y = conv2d(%a, %w)
        %z = conv2d(%b, %w_of_z)

    XNNPACK names what it folds after the constant that was there, so of several the last would serve
    all. It folds by the wrong axis behind linear layers of more than two axes and transposed
    convolutions in groups: these norms become a product and a sum.
    """

    name: ClassVar[str] = "own-norm-state"

    @override
    def run(self, edit: Editor) -> None:
        shared = _Shared(edit)
        for norm in edit.calls(op_info.BATCH_NORM):
            if not _is_constant(norm, (3, 4)):
                continue
            if _folds_by_wrong_axis(norm):
                _as_product(edit, norm)
                continue
            shared.own(norm, (1, 2))
            layer = norm.args[0]
            if isinstance(layer, fx.Node) and layer.target in (*CONVOLUTIONS, *LINEAR):
                shared.own(layer, (1, 2))
        for layer in edit.calls(*CONVOLUTIONS):
            info = op_info.info_of(layer)
            if info is not None and info.convolution is not None and info.convolution.ndim == 1:
                shared.own(layer, (1,))  # its kernel gets an axis, once


class _Shared:
    """Which constants have several readers."""

    def __init__(self, edit: Editor) -> None:
        self.edit = edit
        self.readers = Counter(
            id(edit.value(node)) for node in edit.constants() for _ in node.users
        )

    def own(self, reader: fx.Node, places: tuple[int, ...]) -> None:
        """Copies of what another op reads, too."""
        for place in places:
            operand = op_info.argument(reader, place)
            if not isinstance(operand, fx.Node) or operand.op != "get_attr":
                continue
            value = self.edit.value(operand)
            if self.readers[id(value)] > 1:
                self.readers[id(value)] -= 1
                name = f"{operand.target}_of_{reader.name}"
                copied = self.edit.constant(name, value.detach().clone(), like=reader)
                args = (*reader.args[:place], copied, *reader.args[place + 1 :])
                self.edit.set_args(reader, args)


def _is_constant(norm: fx.Node, places: tuple[int, ...]) -> bool:
    given = [norm.args[place] for place in places]
    return all(isinstance(node, fx.Node) and node.op == "get_attr" for node in given)


def _folds_by_wrong_axis(norm: fx.Node) -> bool:
    layer = norm.args[0]
    if norm.args[1] is None or norm.args[2] is None:
        return True  # it has no name for what it makes
    if not isinstance(layer, fx.Node):
        return False
    if layer.target in LINEAR:
        value = layer.meta.get("val")
        return isinstance(value, Tensor) and value.ndim != 2
    info = op_info.info_of(layer) if layer.target in CONVOLUTIONS else None
    if info is None or info.convolution is None or not info.convolution.transposed:
        return False
    return bool(op_info.argument(layer, info.convolution.groups, 1) != 1)


def _as_product(edit: Editor, norm: fx.Node) -> None:
    readers = list(norm.users)
    if any(reader.args[1] != 0 and reader.users for reader in readers):
        return
    gain, shift, mean, variance = (
        edit.value(given).detach() if isinstance(given, fx.Node) else None
        for given in norm.args[1:5]
    )
    assert mean is not None
    assert variance is not None
    factor = torch.rsqrt(variance.double() + op_info.eps_of(norm))
    factor = factor if gain is None else factor * gain.double()
    offset = -mean.double() * factor
    offset = offset if shift is None else offset + shift.double()
    source = norm.args[0]
    assert isinstance(source, fx.Node)
    value = source.meta["val"]
    shape = [-1, *[1] * (value.ndim - 2)]
    made: Any = source
    for op, each, name in ((_aten.mul.Tensor, factor, "gain"), (_aten.add.Tensor, offset, "shift")):
        constant = each.to(value.dtype).reshape(shape)
        held = edit.constant(f"{norm.name}_{name}", constant, like=norm)
        made = edit.call(op, made, held, like=norm)
    for reader in readers:
        if reader.args[1] == 0:
            edit.replace(reader, made)
        else:
            edit.erase(reader)
    edit.erase(norm)


@dataclass(frozen=True)
class Conv1dAsConv2d(Pass):
    """Turn 1-D convolutions of rounded values by float weights into 2-D ones.

    Before:
        %y = conv1d(%d, %w, …)

    After:
        %u = unsqueeze(%d, -1)
        %v = conv2d(%u, %w', …)
        %y = squeeze(%v, -1)

    XNNPACK does so itself, but then takes the values for integers, which its kernels of float weights
    are not for.
    """

    name: ClassVar[str] = "conv1d-as-conv2d"

    @override
    def run(self, edit: Editor) -> None:
        for node in edit.calls(*CONVOLUTIONS):
            info = op_info.info_of(node)
            places = None if info is None else info.convolution
            weight = op_info.argument(node, 1)
            if places is None or places.ndim != 1 or not is_rounded(node.args[0]):
                continue
            if _is_padded_unevenly(node):
                continue  # the padding becomes an op of its own
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                edit.replace(node, _in_two_dimensions(edit, node, weight))


def _in_two_dimensions(edit: Editor, node: fx.Node, weight: fx.Node) -> fx.Node:
    info = op_info.info_of(node)
    assert info is not None
    places = info.convolution
    assert places is not None

    def both(place: int, default: int, other: int) -> list[int]:
        given = op_info.argument(node, place, default)
        first = given[0] if isinstance(given, list | tuple) else given
        return [first, other]

    kernel = edit.value(weight).detach().unsqueeze(-1).contiguous()
    wide = edit.constant(f"{weight.target}_2d_of_{node.name}", kernel, like=node)
    stride = both(places.stride, 1, 1)
    dilation = both(places.dilation, 1, 1)
    groups = op_info.argument(node, places.groups, 1)
    padding: Any = op_info.argument(node, places.padding, 0)
    if isinstance(padding, str):
        padding = [dilation[0] * (kernel.shape[2] - 1) // 2 if padding == "same" else 0, 0]
    else:
        padding = both(places.padding, 0, 0)
    behind: tuple[Any, ...] = (padding, dilation, places.transposed, [0, 0], groups)
    if places.transposed:
        extra = both(_output_padding_place(node), 0, 0)
        behind = (padding, dilation, True, extra, groups)
    given = edit.call(_aten.unsqueeze.default, node.args[0], -1, like=node)
    bias = op_info.argument(node, info.weights[0].bias)
    made = edit.call(_aten.convolution.default, given, wide, bias, stride, *behind, like=node)
    return edit.call(_aten.squeeze.dim, made, -1, like=node)


def _is_padded_unevenly(node: fx.Node) -> bool:
    info = op_info.info_of(node)
    places = None if info is None else info.convolution
    weight = node.args[1]
    if places is None or op_info.argument(node, places.padding) != "same":
        return False
    dilation = op_info.argument(node, places.dilation, 1)
    step = dilation[0] if isinstance(dilation, list | tuple) else dilation
    return bool(step * (weight.meta["val"].shape[2] - 1) % 2)  # type: ignore[union-attr]


def _output_padding_place(node: fx.Node) -> int:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return names.index("output_padding")
