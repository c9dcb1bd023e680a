"""Rewrite quantized programs, exactly, into the forms that XNNPACK computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.analysis.quantized import quantized_ops
from graphopt.analysis.stored_values import find_quantized_weights
from graphopt.backends.executorch.integer_kernels import (
    DEQUANTIZE,
    QUANTIZE,
    is_rounded,
    only_user,
)
from graphopt.backends.executorch.kernels import (
    CLAMPS,
    CONCATENATIONS,
    CONVOLUTIONS,
    LAYOUT,
    LINEAR,
    RESHAPES,
    VIEWS,
)
from graphopt.backends.executorch.weight_forms import bias_place, store_weight
from graphopt.ir import op_info
from graphopt.ir.editor import Editor
from graphopt.passes import DequantizeToShiftScale
from graphopt.passes.pass_base import Pass

__all__ = ["DuplicateDequantize", "LegalizeForXNNPACK"]

_aten = torch.ops.aten


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
            info = op_info.info_of(node)
            if info is not None and info.check and not node.users:
                edit.erase(node)
        for node in edit.calls(*op_info.targets(lambda info: info.pools_over is not None)):
            _keep_dims(edit, node)
        for node in edit.calls(*CLAMPS):
            if _is_hardtanh(node):
                edit.replace(node, edit.call(_aten.hardtanh.default, *node.args, like=node))
        _to_int8(edit)
        for node in edit.calls(*CONCATENATIONS):
            _one_scale(edit, node)
        for node in edit.calls(*RESHAPES):
            _drop_if_nothing(edit, node)
        for node in edit.calls(*LAYOUT):
            _round_again(edit, node)
        for weight in find_quantized_weights(edit.gm):
            store_weight(edit, weight)
        _own_biases(edit)
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
            # a part of the text: ExecuTorch's own dialect says more around it
            if "quantized_decomposed.dequantize_per_" not in str(node.target):
                continue
            for reader in list(node.users)[1:]:
                copied = edit.call(node.target, *node.args, like=node, **node.kwargs)
                reader.replace_input_with(node, copied)


def _is_hardtanh(clamp: fx.Node) -> bool:
    """Whether a clamp has the type of its input and both ends, the lower one first."""
    value = clamp.args[0].meta.get("val") if isinstance(clamp.args[0], fx.Node) else None
    ends = clamp.args[1:3]
    if not isinstance(value, Tensor) or not value.is_floating_point() or len(ends) != 2:
        return False
    low, high = ends
    return isinstance(low, int | float) and isinstance(high, int | float) and low < high


def _own_biases(edit: Editor) -> None:
    """A bias of its own for each op that computes with integers: XNNPACK scales one only once."""
    readers = Counter(str(node.target) for node in edit.constants() for _ in node.users)
    for node in edit.calls(*CONVOLUTIONS, *LINEAR):
        place = bias_place(node)
        bias = op_info.argument(node, place)
        if not isinstance(bias, fx.Node) or bias.op != "get_attr" or not is_rounded(node.args[0]):
            continue
        name = str(bias.target)
        if readers[name] > 1:
            readers[name] -= 1
            value = edit.value(bias).detach().clone()
            copied = edit.constant(f"{name}_of_{node.name}", value, like=node)
            edit.set_args(node, (*node.args[:place], copied, *node.args[place + 1 :]))


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
        if target not in (QUANTIZE, DEQUANTIZE) or (target == DEQUANTIZE and not is_rounded(node)):
            continue
        x, scale, zero, low, high, kind = node.args
        if kind is torch.uint8:
            zero, low, high = zero - 128, low - 128, high - 128
        if (low, high, kind) == (-128, 127, torch.int8):
            continue
        limits = (scale, zero, -128, 127, torch.int8)
        if target == DEQUANTIZE:
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
    items = [item for item in _items(node.args[0]) if is_rounded(item)]
    user = only_user(node)
    if len(items) != len(_items(node.args[0])) or user is None or str(user.target) != QUANTIZE:
        return
    wanted = _scale_of(user)
    made = [
        item if _scale_of(item) == wanted else _pair(edit, item, wanted, node) for item in items
    ]
    edit.set_args(node, (made, *node.args[1:]))


def _drop_if_nothing(edit: Editor, node: fx.Node) -> None:
    """Drop copies and slices of whole values, also those between roundings with one scale.

    XNNPACK drops them, too, and refuses a delegate whose result is then what it is given. A copy into
    another layout of memory stays where views behind it rely on it.
    """
    source, user = node.args[0], only_user(node)
    if not isinstance(source, fx.Node) or source.op != "call_function":
        return
    values: list[Any] = [each.meta.get("val") for each in (source, node)]
    if not all(isinstance(value, Tensor) for value in values):
        return
    sizes, strides = [_words(x.shape) for x in values], [_words(x.stride()) for x in values]
    if sizes[0] != sizes[1]:
        return
    if is_rounded(source) and user is not None and str(user.target) == QUANTIZE:
        if _scale_of(user) == _scale_of(source) and (
            strides[0] == strides[1] or not _is_viewed(user)
        ):
            edit.replace(user, source.args[0])  # type: ignore[arg-type]
            edit.erase(node)
    elif strides[0] == strides[1] and all(reader.op != "output" for reader in node.users):
        edit.replace(node, source)


def _words(sizes: Iterable[Any]) -> list[str]:
    """Sizes as they are written: to compare open ones themselves would bind the program to the answer."""
    return list(map(str, sizes))


def _is_viewed(node: fx.Node) -> bool:
    """Whether a view of a value, or of another one that lies in memory as it does, is taken."""
    sizes, seen, pending = _words(node.meta["val"].shape), {node}, [node]
    while pending:
        for reader in pending.pop().users:
            if reader.target in VIEWS:
                return True
            value = reader.meta.get("val")
            if reader in seen or not isinstance(value, Tensor):
                continue
            if _words(value.shape) == sizes:
                seen.add(reader)
                pending.append(reader)
    return False


def _round_again(edit: Editor, node: fx.Node) -> None:
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_rounded(source):
        return
    scale = _scale_of(source)
    info = op_info.info_of(node)
    if info is not None and op_info.argument(node, info.fill) not in (0, 0.0, None):
        return
    user = only_user(node)
    if user is not None and str(user.target) == QUANTIZE and _scale_of(user) == scale:
        return
    if all(reader.op == "output" for reader in node.users):
        return
    readers = set(node.users)
    rounded = _pair(edit, node, scale, node.next)
    edit.redirect(node, rounded, lambda reader: reader not in readers)
