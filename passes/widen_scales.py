"""Scales that are powers of two as floats, for targets whose integers are scaled by floats only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from typing_extensions import override

from graphopt.analysis.stored_values import find_quantized_weights
from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass

__all__ = ["WidenScales"]

_ops = torch.ops.graphopt


@dataclass(frozen=True)
class WidenScales(Pass):
    """Store the e8m0 scales of integer weights in the weight's own float type.

    Before:
        %scale = get_attr[fc.weight_scale]                                  # float8_e8m0fnu
        %w = graphopt.shift_scale(%data, %scale, None, "int8", shape, float32)

    After:
        %scale = get_attr[fc.weight_factor]                                 # float32
        %w = graphopt.shift_scale(%data, %scale, None, "int8", shape, float32)
    """

    name: ClassVar[str] = "widen-scales"

    @override
    def run(self, edit: Editor) -> None:
        for weight in find_quantized_weights(edit.gm):
            node: Any = weight.node
            if node.target is not _ops.shift_scale.default or "int" not in weight.storage:
                continue
            data, scale, *rest = node.args
            value = edit.value(scale)
            if value.dtype != torch.float8_e8m0fnu:
                continue
            wide = value.to(torch.float32).to(node.meta["val"].dtype)
            factors = edit.constant(f"{weight.name}_factor", wide, like=node)
            dense = edit.call(node.target, data, factors, *rest, like=node)
            edit.replace(node, dense)
            edit.drop(scale)
