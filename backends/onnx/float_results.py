"""Linear layers between integers and floats, as ONNX Runtime computes them with integers.

Its kernel of `Gemm` with integers gives floats, too, but only without a bias in float (1.32).
"""

from __future__ import annotations

from typing import Any

from graphopt.backends.onnx.emitter import Emitter
from graphopt.backends.onnx.matmul_nbits import is_plain

__all__ = ["add_biases_behind"]

_DEQUANTIZE, _QUANTIZE = "DequantizeLinear", "QuantizeLinear"
_HANDED_ON = ("Relu", "Clip")  # what the runtime takes up into the rounding behind


def add_biases_behind(model: Any) -> None:
    """Add the bias of products of integers whose results stay in float behind them.

    Args:
        model: Of onnx_ir; it is changed.
    """
    emit = Emitter(model.graph)
    for node in [node for node in model.graph if node.op_type == "Gemm"]:
        (result,) = node.outputs
        x, weight, bias = (*node.inputs, None)[:3]
        decoded = _is_decoded(x) and _is_decoded(weight)
        if bias is None or not decoded or not is_plain(node) or _is_rounded(result):
            continue
        emit.place = node
        whole = {key: node.attributes[key].value for key in node.attributes}
        made = emit.call("Gemm", [x, weight], result, **whole)
        emit.replace(emit.call("Add", [made, bias], result))


def _is_decoded(value: Any) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == _DEQUANTIZE


def _is_rounded(value: Any) -> bool:
    users = [use.node for use in value.uses()]
    return any(
        user.op_type == _QUANTIZE or (user.op_type in _HANDED_ON and _is_rounded(user.outputs[0]))
        for user in users
    )
