"""Write dequantized constants in our op, whichever op they came in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from graphopt.analysis.stored_values import find_quantized_weights
from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass

__all__ = ["DequantizeToShiftScale"]

_ops = torch.ops.graphopt


@dataclass(frozen=True)
class DequantizeToShiftScale(Pass):
    """Turn the ecosystem's dequantize ops on constants into `graphopt.shift_scale`.

    Before:
        %w = quantized_decomposed.dequantize_per_channel(%data, %scale, %zero, 0, −128, 127, int8)

    After:
        %w = graphopt.shift_scale(%packed, %scale, %offset, "int8", shape, float32)

    Examples:
        >>> from graphopt.quantization import QuantizerConfig
        >>> config = QuantizerConfig.presets.w8()
        >>> gm = graphopt.compress(model, example, config).graph_module
        >>> DequantizeToShiftScale()(gm).modified
        True
    """

    name: ClassVar[str] = "dequantize-to-shift-scale"

    @override
    def run(self, edit: Editor) -> None:
        for weight in find_quantized_weights(edit.gm):
            node = weight.node
            if node.target is _ops.shift_scale.default:
                continue
            stored = edit.value(weight.data)
            if "per_channel" in str(node.target):
                scale = edit.value(node.args[1])  # type: ignore[arg-type]
                zero = edit.value(node.args[2]).to(stored.dtype)  # type: ignore[arg-type]
            else:
                scale = torch.tensor(float(node.args[1]))  # type: ignore[arg-type]
                zero = torch.tensor(int(node.args[2]), dtype=stored.dtype)  # type: ignore[arg-type]
            packed = stored.contiguous().view(torch.uint8).reshape(-1).clone()
            data = edit.constant(f"{weight.name}_data", packed, like=node)
            factors = edit.constant(
                f"{weight.name}_factor", scale.reshape(weight.counts).clone(), like=node
            )
            offset = None
            if bool(zero.any()):
                zeros = zero.reshape(weight.counts).clone()
                offset = edit.constant(f"{weight.name}_offset", zeros, like=node)
            dense = edit.call(
                _ops.shift_scale.default,
                data,
                factors,
                offset,
                weight.storage,
                list(weight.shape),
                node.meta["val"].dtype,
                like=node,
            )
            edit.replace(node, dense)
