"""State without dimensions, for targets whose tensors have some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from typing_extensions import override

from graphopt.ir.editor import Editor
from graphopt.ir.state import state_nodes
from graphopt.passes.pass_base import Pass

__all__ = ["StatesWithAxes"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class StatesWithAxes(Pass):
    """Keep a state without dimensions as one of size 1.

    Before:
        %n = get_attr[n]                 # int64[]
        %copy = copy_(%n, %more)

    After:
        %n = get_attr[n]                 # int64[1]
        %read = reshape(%n, [])
        %copy = copy_(%n, reshape(%more, [1]))
    """

    name: ClassVar[str] = "states-with-axes"

    @override
    def run(self, edit: Editor) -> None:
        for node, writer in state_nodes(edit.gm).items():
            if node.op == "get_attr" and not edit.value(node).dim():
                _reshape(edit, node, writer)


def _reshape(edit: Editor, node: fx.Node, writer: fx.Node) -> None:
    edit.set_value(node, edit.value(node).detach().reshape(1).clone())
    node.meta["val"] = edit.fake(edit.value(node))
    first = next(user for user in node.graph.nodes if node in user.all_input_nodes)
    old = set(node.users)
    read = edit.call(_aten.reshape.default, node, [], like=node, before=first)
    edit.redirect(node, read, lambda reader: reader is writer or reader not in old)
    written = edit.call(_aten.reshape.default, writer.args[1], [1], like=node, before=writer)
    edit.set_args(writer, (node, written))
