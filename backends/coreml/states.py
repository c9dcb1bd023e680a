"""The state of Core ML programs, which is in float16 and zero before the first call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from typing_extensions import override

from graphopt.errors import LoweringError
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.ir.state import state_nodes, state_values
from graphopt.numerics.finite import all_finite
from graphopt.passes.pass_base import Pass

__all__ = [
    "HalfStates",
    "decoded_state",
    "encoded_zeros",
    "state_refusals",
]

_aten = torch.ops.aten
_DIGIT = 2048  # float16 holds every integer up to it
_DIGITS = 3  # 2048³ is more than 2³²


def state_refusals(program: Program, target: str) -> list[str]:
    """Why a deployment target cannot hold a program's state, one line per reason.

    Args:
        program: In our vocabulary.
        target: "" for any.
    """
    values = state_values(program.graph_module)
    if target in ("iOS16", "iOS17") and values:
        return [
            f"{next(iter(values))}: state for {target}; raise minimum_deployment_target to iOS18, or"
            " let the model take what it keeps as an input and return it"
        ]
    reasons = []
    for name, value in values.items():
        if value.is_floating_point() and not all_finite(value):
            reasons.append(
                f"{name}: state that starts with infinite values or NaN, where Core ML's starts as"
                " zero and a difference from infinity is none; start from finite values, such as -1e4"
            )
        elif value.dtype is torch.int8:
            reasons.append(
                f"{name}: an int8 cache, where Core ML's state is float16 and would be larger than the"
                " cache in float; leave kv_cache_quant_configs out for this target"
            )
        elif value.is_complex():
            reasons.append(f"{name}: complex state; keep real and imaginary parts apart")
    return reasons


def encoded_zeros(value: Tensor) -> Tensor:
    """What the artifact holds of a state before the first call.

    Args:
        value: The program's buffer.
    """
    shape = value.shape or (1,)
    return torch.zeros(_stored_shape(shape, value.dtype), dtype=torch.float16)


def decoded_state(stored: NDArray[Any], initial: Tensor) -> Tensor:
    """A state's value from what the artifact holds.

    Args:
        stored: float16.
        initial: The program's buffer before the first call.
    """
    held = torch.from_numpy(np.ascontiguousarray(stored)).double()
    if initial.dtype is torch.bool:
        return (held != 0).reshape(initial.shape) ^ initial
    if initial.is_floating_point():
        return (held.reshape(initial.shape) + initial.double()).to(initial.dtype)
    weights = torch.tensor([float(_DIGIT**place) for place in range(_DIGITS)], dtype=held.dtype)
    return ((held * weights).sum(-1).reshape(initial.shape) + initial).to(initial.dtype)


def _stored_shape(shape: Any, dtype: torch.dtype) -> tuple[int, ...]:
    digits = not dtype.is_floating_point and dtype is not torch.bool
    return (*shape, _DIGITS) if digits else tuple(shape)


@dataclass(frozen=True)
class HalfStates(Pass):
    """Keep state as float16 that starts as zero: differences from its initial value.

    Floats are rounded to float16, booleans are 0 and 1, integers are three digits of 2048 each.

    Before:
        %rows = get_attr[rows]                 # float32, starts as 1
        %n = get_attr[n]                       # int64
        %copy = copy_(%rows, %new)
        %copy_1 = copy_(%n, %more)

    After:
        %rows = get_attr[rows]                 # float16, starts as 0
        %read = add(_to_copy(%rows, float32), %rows_start)
        %copy = copy_(%rows, _to_copy(sub(%new, %rows_start), float16))
        %copy_1 = copy_(%n, _to_copy(digits(%more), float16))

    A tensor without dimensions has one of size 1.
    """

    name: ClassVar[str] = "half-states"

    @override
    def run(self, edit: Editor) -> None:
        for node, writer in state_nodes(edit.gm).items():
            if node.op == "get_attr" and edit.value(node).dtype is not _ENCODED:
                _encode(edit, node, writer)


_ENCODED = torch.float16


def _encode(edit: Editor, node: fx.Node, writer: fx.Node) -> None:
    if str(writer.target) != "aten.copy_.default":
        raise LoweringError(
            f"{node.target}: {writer.target} writes it in place in a graph that was not captured by"
            " graphopt.capture; capture the program again"
        )
    initial = edit.value(node).detach().clone()
    edit.set_value(node, encoded_zeros(initial))
    node.meta["val"] = edit.fake(edit.value(node))
    first = next(user for user in node.graph.nodes if node in user.all_input_nodes)
    call = _calls(edit, node, first)
    start = None
    if bool((initial != 0).any()):
        start = edit.constant(f"{node.target}_start", initial, like=node, before=first)
    old = set(node.users)
    value = _read(call, node, initial, start)
    edit.redirect(node, value, lambda reader: reader is writer or reader not in old)
    new = writer.args[1]
    assert isinstance(new, fx.Node)
    edit.set_args(writer, (node, _written(_calls(edit, node, writer), new, initial, start)))


def _calls(edit: Editor, like: fx.Node, before: fx.Node) -> Callable[..., fx.Node]:
    return lambda op, *args, **kwargs: edit.call(op, *args, like=like, before=before, **kwargs)


def _read(
    call: Callable[..., fx.Node], node: fx.Node, initial: Tensor, start: fx.Node | None
) -> fx.Node:
    shape = list(initial.shape)
    if initial.dtype is torch.bool:
        held = call(_aten.ne.Scalar, call(_aten.reshape.default, node, shape), 0)
        return held if start is None else call(_aten.logical_xor.default, held, start)
    if initial.is_floating_point():
        value = call(_aten._to_copy.default, node, dtype=initial.dtype)
    else:
        # digits of negative numbers are those of their floor, so that the sum is exact
        whole = call(_aten._to_copy.default, node, dtype=initial.dtype)
        parts = [call(_aten.select.int, whole, -1, place) for place in range(_DIGITS)]
        value = parts[-1]
        for part in reversed(parts[:-1]):
            value = call(_aten.add.Tensor, call(_aten.mul.Scalar, value, _DIGIT), part)
    if not shape:
        value = call(_aten.reshape.default, value, shape)
    return value if start is None else call(_aten.add.Tensor, value, start)


def _written(
    call: Callable[..., fx.Node], value: fx.Node, initial: Tensor, start: fx.Node | None
) -> fx.Node:
    if initial.dtype is torch.bool:
        value = value if start is None else call(_aten.logical_xor.default, value, start)
    elif start is not None:
        value = call(_aten.sub.Tensor, value, start)
    if not initial.dim():
        value = call(_aten.reshape.default, value, [1])
    if not initial.is_floating_point() and initial.dtype is not torch.bool:
        digits = []
        for _ in range(_DIGITS - 1):
            rest = call(_aten.div.Tensor_mode, value, _DIGIT, rounding_mode="floor")
            digits.append(call(_aten.sub.Tensor, value, call(_aten.mul.Scalar, rest, _DIGIT)))
            value = rest
        value = call(_aten.stack.default, [*digits, value], -1)
    return call(_aten._to_copy.default, value, dtype=torch.float16)
