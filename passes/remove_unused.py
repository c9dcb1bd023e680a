"""Remove what no output depends on: pure nodes and constants without users."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx
from typing_extensions import override

from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass

__all__ = ["RemoveUnused"]


@dataclass(frozen=True)
class RemoveUnused(Pass):
    """Drop nodes without users (inputs and nodes with side effects stay) and their constants.

    Before:
        %w = get_attr[fc.weight]
        %t = t(%w)
        return %x

    After:
        return %x

    Attributes:
        keep_tied: Keep other names of tensors that are read under one, so that state dicts keep them.

    Examples:
        >>> captured = graphopt.capture(model, example)
        >>> RemoveUnused()(captured.graph_module).modified  # nothing is unused
        False
    """

    name: ClassVar[str] = "remove-unused"
    keep_tied: bool = False

    @override
    def run(self, edit: Editor) -> None:
        for node in reversed(list(edit.gm.graph.nodes)):
            if not node.users and _is_pure(node):
                edit.erase(node)
        used = {str(node.target) for node in edit.constants()}
        stored: dict[str, Tensor] = dict(edit.gm.named_parameters(remove_duplicate=False))
        stored |= dict(edit.gm.named_buffers(remove_duplicate=False))
        read = {id(stored[path]) for path in used} if self.keep_tied else set()
        for path, tensor in stored.items():
            if path not in used and id(tensor) not in read:
                edit.delete_constant(path)


def _is_pure(node: fx.Node) -> bool:
    return node.op in ("get_attr", "call_function") and not node.is_impure()
