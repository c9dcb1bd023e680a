"""Programs in float16 for coremltools, which gives many ops constants in float32 and then refuses both."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from typing_extensions import override

from graphopt.backends.float_types import FloatsToSingle
from graphopt.ir.editor import Editor
from graphopt.passes.insert_fake_quantize import place_behind
from graphopt.passes.pass_base import Pass

__all__ = ["HalvesToSingle"]

_HALF = frozenset({torch.float16})
_to_copy = torch.ops.aten._to_copy.default


@dataclass(frozen=True)
class HalvesToSingle(Pass):
    """Write in float32 what is computed in float16: the converter rounds it again, as for every program.

    Before:
        %x = placeholder                         # float16
        %y = group_norm(%x, …)                   # float16

    After:
        %x = placeholder                         # float16
        %wide = _to_copy(%x, dtype=float32)
        %y = group_norm(%wide, …)                # float32
        %back = _to_copy(%y, dtype=float16)

    Inputs and outputs keep their types.
    """

    name: ClassVar[str] = "halves-to-single"
    tolerance: ClassVar[float | None] = None  # less is rounded

    @override
    def run(self, edit: Editor) -> None:
        graph = edit.gm.graph
        if not any(map(_is_half, graph.nodes)):
            return
        inputs = [node for node in graph.find_nodes(op="placeholder") if _is_half(node)]
        (output,) = graph.find_nodes(op="output")
        given, spec = pytree.tree_flatten(output.args[0])
        halves = {leaf for leaf in given if isinstance(leaf, fx.Node) and _is_half(leaf)}
        FloatsToSingle(_HALF).run(edit)
        for node in inputs:
            node.meta["val"] = node.meta["val"].to(torch.float16)
            before = place_behind(node)
            wide = edit.call(_to_copy, node, dtype=torch.float32, like=node, before=before)
            edit.redirect(node, wide, functools.partial(_keeps, node))
        back = {
            leaf: edit.call(_to_copy, leaf, dtype=torch.float16, like=leaf, before=output)
            for leaf in halves
        }
        edit.set_args(
            output, (pytree.tree_unflatten([back.get(leaf, leaf) for leaf in given], spec),)
        )


def _is_half(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype is torch.float16


def _keeps(node: fx.Node, user: fx.Node) -> bool:
    """Whether a user writes to a value."""
    schema = getattr(user.target, "_schema", None)
    return schema is not None and schema.is_mutable and user.args[0] is node
