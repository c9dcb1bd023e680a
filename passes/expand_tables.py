"""Replace table lookups by the dense weights that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from typing_extensions import override

from graphopt.analysis.stored_values import find_lookups
from graphopt.ir.editor import Editor, operands
from graphopt.passes.pass_base import Pass
from graphopt.run.interpreter import constant_value

__all__ = ["ExpandTables", "drop_unread"]


@dataclass(frozen=True)
class ExpandTables(Pass):
    """Compute every lookup, for targets that have none.

    Before:
        %w = graphopt.lut_to_dense(%indices, %lut, n_bits, shape)

    After:
        %w = get_attr[fc.weight]

    The values are those of the tables; only the storage is that of a dense weight. What was expanded
    is noted in `annotations.notes_of`.

    Examples:
        >>> gm = compressed.graph_module
        >>> ExpandTables()(gm).modified
        True
        >>> lookup = torch.ops.graphopt.lut_to_dense.default
        >>> len(gm.graph.find_nodes(op="call_function", target=lookup))
        0
    """

    name: ClassVar[str] = "expand-tables"

    @override
    def run(self, edit: Editor) -> None:
        for lookup in find_lookups(edit.gm):
            node = lookup.dense
            made = edit.constant(lookup.name, constant_value(edit.gm, node), like=node)
            read = operands(node)
            edit.replace(node, made)
            drop_unread(edit, read)
            note = f"{lookup.name}: {lookup.n_bits}-bit table stored as a dense weight"
            edit.note(note)


def drop_unread(edit: Editor, nodes: list[fx.Node]) -> None:
    """Drop what nothing reads any more."""
    for node in nodes:
        if node.users or node._erased:
            continue
        if node.op == "get_attr":
            edit.drop(node)
            continue
        read = operands(node)
        edit.erase(node)
        drop_unread(edit, read)
