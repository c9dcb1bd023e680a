"""Constants in types that ONNX, or its kernels on the CPU, have not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from typing_extensions import override

from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass

__all__ = ["ScalesToFloat32"]

_ours = torch.ops.graphopt


@dataclass(frozen=True)
class ScalesToFloat32(Pass):
    """Store scales that are powers of two, in eight bits, as float32.

    Before:
        %scale = get_attr[fc.weight_scale]       # float8_e8m0fnu
        %w = graphopt.shift_scale(%packed, %scale, …)

    After:
        %scale = get_attr[fc.weight_scale]       # float32
        %w = graphopt.shift_scale(%packed, %scale, …)
    """

    name: ClassVar[str] = "scales-to-float32"

    @override
    def run(self, edit: Editor) -> None:
        for node in edit.calls(_ours.shift_scale.default):
            scale = node.args[1]
            assert isinstance(scale, fx.Node)
            if scale.op == "get_attr" and scale.meta["val"].dtype is torch.float8_e8m0fnu:
                wide = edit.value(scale).to(torch.float32)
                edit.set_value(scale, wide)
                scale.meta["val"] = edit.fake(wide)
