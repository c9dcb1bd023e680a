"""Norms of one type: onnxscript fuses those of float16 with a scale in float32, whose result the checker refuses."""

from __future__ import annotations

from typing import Any

from graphopt.backends.onnx.emitter import Emitter

__all__ = ["in_one_type"]


def in_one_type(model: Any) -> None:
    """Give `RMSNormalization` an input and a scale of the wider of their types.

    The result keeps its own, which is the scale's.

    Args:
        model: Of onnx_ir; it is changed.
    """
    emit = Emitter(model.graph)
    for node in [node for node in model.graph if node.op_type == "RMSNormalization"]:
        types = {value.dtype for value in node.inputs}
        if len(types) == 1:
            continue
        emit.place = node
        (result,) = node.outputs
        wider = max(types, key=lambda each: int(each.bitwidth))
        inputs = [_as(emit, value, wider) for value in node.inputs]
        attributes = {key: value.value for key, value in node.attributes.items()}
        made = emit.call("RMSNormalization", inputs, result, kind=wider.name, **attributes)
        emit.replace(_as(emit, made, result.dtype))


def _as(emit: Emitter, value: Any, kind: Any) -> Any:
    if value.dtype == kind:
        return value
    return emit.call("Cast", [value], value, kind=kind.name, to=int(kind))
