"""Replace sparse weights by dense ones, for targets that have no sparse form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.analysis.stored_values import find_sparse
from graphopt.ir.editor import Editor, operands
from graphopt.passes.expand_tables import drop_unread
from graphopt.passes.pass_base import Pass
from graphopt.run.interpreter import constant_value

__all__ = ["ExpandSparse"]

_ops = torch.ops.graphopt
_DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"


@dataclass(frozen=True)
class ExpandSparse(Pass):
    """Put the values of pruned weights into dense ones.

    Before:
        %w = graphopt.sparse_to_dense(%values, %mask, shape)

    After:
        %w = get_attr[fc.weight_dense]

    Symmetric int8 values with one scale become a dense int8 weight with that scale, all others float.
    Outliers beside tables belong to these and stay. What was expanded is noted in
    `annotations.notes_of`.

    Examples:
        >>> gm = graphopt.compress(model, example, {"pruning": {}}).graph_module
        >>> sparse = torch.ops.graphopt.sparse_to_dense.default
        >>> len(gm.graph.find_nodes(op="call_function", target=sparse))
        2
        >>> ExpandSparse()(gm).modified
        True
        >>> len(gm.graph.find_nodes(op="call_function", target=sparse))
        0
    """

    name: ClassVar[str] = "expand-sparse"

    @override
    def run(self, edit: Editor) -> None:
        for weight in find_sparse(edit.gm):
            node, name = weight.node, weight.name
            values, mask, shape = node.args
            assert isinstance(values, fx.Node)
            integers = _integers(edit, values)
            if integers is None:
                made = edit.constant(f"{name}_dense", constant_value(edit.gm, node), like=node)
            else:
                where = edit.value(mask)  # type: ignore[arg-type]
                stored = _ops.sparse_to_dense.default(integers, where, shape)
                data = edit.constant(f"{name}_quantized", stored, like=node)
                rest: tuple[Any, ...] = values.args[1:]
                made = edit.call(values.target, data, *rest, like=node)  # type: ignore[arg-type]
            read = operands(node)
            edit.replace(node, made)
            drop_unread(edit, read)
            note = f"{name}: stored as a dense weight with zeros"
            edit.note(note)


def _integers(edit: Editor, values: fx.Node) -> Tensor | None:
    """The integers of values that one scale dequantizes symmetrically."""
    if str(values.target) != _DEQUANTIZE or values.args[2] != 0:
        return None
    source = values.args[0]
    return edit.value(source) if isinstance(source, fx.Node) and source.op == "get_attr" else None
