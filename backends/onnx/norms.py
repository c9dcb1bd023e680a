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
        emit.place = node
        types = [value.dtype for value in node.inputs]
        wider = max(types, key=lambda each: int(each.bitwidth))
        if len(set(types)) == 1:
            continue
        (result,) = node.outputs
        wanted = result.dtype
        for place, value in enumerate(node.inputs):
            if value.dtype != wider:
                cast = emit.call("Cast", [value], value, kind=wider.name, to=int(wider))
                node.replace_input_with(place, cast)
        if wanted == wider:
            continue
        attributes = {key: value.value for key, value in node.attributes.items()}
        made = emit.call(
            "RMSNormalization", list(node.inputs), result, kind=wider.name, **attributes
        )
        emit.replace(emit.call("Cast", [made], result, kind=wanted.name, to=int(wanted)))
