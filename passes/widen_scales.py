"""Scales in types that a target lacks as floats of a type that it has."""

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
    """Store scales of types that a target lacks in the weight's own float type.

    Before:
        %scale = get_attr[fc.weight_scale]                                  # float8_e8m0fnu
        %w = graphopt.shift_scale(%data, %scale, None, "int8", shape, float32)

    After:
        %scale = get_attr[fc.weight_scale]                                  # float32
        %w = graphopt.shift_scale(%data, %scale, None, "int8", shape, float32)

    Attributes:
        floats: Whether e8m0 scales of narrow floats are widened, too, and not those of integers only.
        bfloat16: Whether scales in bfloat16 are.
        dtype: Type that they get; None is the weight's own.

    Examples:
        >>> spec = {"dtype": "int8", "scale_dtype": "float8_e8m0fnu"}
        >>> specs = {"op_state_spec": {"weight": spec}}
        >>> specs |= {"op_input_spec": None, "op_output_spec": None}
        >>> config = {"quantization": {"global_config": specs}}
        >>> gm = graphopt.compress(model, example, config).graph_module
        >>> WidenScales()(gm).modified
        True
    """

    name: ClassVar[str] = "widen-scales"
    floats: bool = False
    bfloat16: bool = False
    dtype: torch.dtype | None = None

    @override
    def run(self, edit: Editor) -> None:
        for node in edit.calls(_ops.shift_scale.default):
            scale, storage = node.args[1], str(node.args[3])
            assert isinstance(scale, fx.Node)
            if scale.op != "get_attr":
                continue
            kind = scale.meta["val"].dtype
            powers = kind is torch.float8_e8m0fnu and ("int" in storage or self.floats)
            if powers or (kind is torch.bfloat16 and self.bfloat16):
                wide = edit.value(scale).to(torch.float32)
                wide = wide.to(self.dtype or node.meta["val"].dtype)
                edit.set_value(scale, wide)
                scale.meta["val"] = edit.fake(wide)
