"""Products in float16 of operands whose batch is turned inwards, which ONNX Runtime cannot load.

Where the first axis of one operand becomes the one before the last or the last, and the other operand is a
matrix, it fuses both into a product for which it has no float16, and the process ends (1.32).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.backends.onnx.emitter import Emitter

__all__ = ["turn_results"]


def turn_results(model: Any) -> None:
    """Turn what such a product gives in place of what it takes; it computes the same sums.

    Args:
        model: Of onnx_ir; it is changed.
    """
    emit = Emitter(model.graph)
    for node in [node for node in model.graph if node.op_type == "MatMul"]:
        left, right = node.inputs
        turned, matrix = (left, right) if _rank(right) == 2 else (right, left)
        x, order = _untransposed(turned)
        if _rank(matrix) != 2 or not _is_turned(x, order):
            continue
        emit.place = node
        if turned is left:
            emit.replace(_product(emit, node, x, order, matrix))
            continue
        # W·X is the transposed product of both transposed
        last = len(order) - 1
        across = [*order[:-2], order[-1], order[-2]]
        made = _product(emit, node, x, across, _turn(emit, matrix, [1, 0]))
        emit.replace(_turn(emit, made, [*range(last - 1), last, last - 1]))


def _rank(value: Any) -> int | None:
    return None if value.shape is None else len(value.shape)


def _untransposed(value: Any) -> tuple[Any, list[int]]:
    """What a value is the transpose of, through one node or several, and its axes there."""
    order = list(range(_rank(value) or 0))
    while (node := value.producer()) is not None and node.op_type == "Transpose":
        if "perm" not in node.attributes:
            break
        axes = list(node.attributes["perm"].as_ints())
        value, order = node.inputs[0], [axes[axis] for axis in order]
    return value, order


def _is_turned(value: Any, order: Sequence[int]) -> bool:
    """Whether the axes of a value in float16 are taken in an order that the runtime cannot compute."""
    inner = len(order) - 2
    known = inner > 0 and value.shape is not None and value.dtype is not None
    return (
        known
        and value.dtype.name == "FLOAT16"
        and list(order[:inner]) == list(range(1, inner + 1))
        and 0 in order[inner:]
    )


def _product(emit: Emitter, node: Any, x: Any, order: Sequence[int], matrix: Any) -> Any:
    """`x` in the order of axes, times the matrix: the leading axes are turned afterwards."""
    *lead, summed = order
    taken = [*reversed(lead), summed]
    if taken != sorted(taken):
        x = _turn(emit, x, taken)
    shape = [*(x.shape[axis] for axis in range(len(lead))), matrix.shape[1]]
    made = emit.call("MatMul", [x, matrix], node.outputs[0], shape=shape)
    return _turn(emit, made, [*reversed(range(len(lead))), len(lead)])


def _turn(emit: Emitter, value: Any, order: Sequence[int]) -> Any:
    shape = [value.shape[axis] for axis in order]
    return emit.call("Transpose", [value], value, shape=shape, perm=list(order))
