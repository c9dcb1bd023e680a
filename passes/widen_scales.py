"""Scales that are powers of two as floats, for targets whose integers are scaled by floats only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from typing_extensions import override

from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass

__all__ = ["WidenScales"]

_ops = torch.ops.graphopt


@dataclass(frozen=True)
class WidenScales(Pass):
    """Store the e8m0 scales of integers in the weight's own float type.

    Before:
        %scale = get_attr[fc.weight_scale]                                  # float8_e8m0fnu
        %w = graphopt.shift_scale(%data, %scale, None, "int8", shape, float32)

    After:
        %scale = get_attr[fc.weight_scale]                                  # float32
        %w = graphopt.shift_scale(%data, %scale, None, "int8", shape, float32)

    Attributes:
        floats: Whether scales of narrow floats are widened, too.
        dtype: Type that they get; None is the weight's own.
    """

    name: ClassVar[str] = "widen-scales"
    floats: bool = False
    dtype: torch.dtype | None = None

    @override
    def run(self, edit: Editor) -> None:
        for node in edit.calls(_ops.shift_scale.default):
            scale, storage = node.args[1], str(node.args[3])
            assert isinstance(scale, fx.Node)
            if scale.op != "get_attr" or scale.meta["val"].dtype is not torch.float8_e8m0fnu:
                continue
            if "int" in storage or self.floats:
                wide = edit.value(scale).to(torch.float32)
                wide = wide.to(self.dtype or node.meta["val"].dtype)
                edit.set_value(scale, wide)
                scale.meta["val"] = edit.fake(wide)
