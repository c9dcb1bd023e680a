"""Store integers of a width that no target has as lookups on a wider grid, exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from typing_extensions import override

from graphopt.ir.editor import Editor
from graphopt.ir.ops import STORAGE_BITS
from graphopt.passes.pass_base import Pass

__all__ = ["IntegersToTables"]

_ops = torch.ops.graphopt


@dataclass(frozen=True)
class IntegersToTables(Pass):
    """Turn dequantized integers of some types into a lookup of int8 entries with the same scales.

    Before:
        %w = graphopt.shift_scale(%packed, %scale, %offset, "int6", shape, float32)

    After:
        %i = graphopt.lut_to_dense(%packed, %lut, 6, shape)
        %w = graphopt.shift_scale(%i, %scale, %offset, "float", shape, float32)

    The packed elements stay as they are: an element's bits are its index, and the table lists the
    integers by their bits, so the size is that of the integers plus one small table.

    Attributes:
        storages: Element types to rewrite.
        wanted: Which of their weights, by the node of `shift_scale`; None takes all.

    Examples:
        >>> specs = {"op_state_spec": {"weight": {"dtype": "int3"}}}
        >>> specs |= {"op_input_spec": None, "op_output_spec": None}
        >>> config = {"quantization": {"global_config": specs}}
        >>> gm = graphopt.compress(model, example, config).graph_module
        >>> IntegersToTables()(gm).modified
        True
    """

    name: ClassVar[str] = "integers-to-tables"
    storages: frozenset[str] = frozenset({"int3", "uint3", "int6", "uint6"})
    wanted: Callable[[fx.Node], bool] | None = None

    @override
    def run(self, edit: Editor) -> None:
        for node in edit.calls(_ops.shift_scale.default):
            storage = str(node.args[3])
            if storage in self.storages and (self.wanted is None or self.wanted(node)):
                self._rewrite(edit, node, storage)

    def _rewrite(self, edit: Editor, node: fx.Node, storage: str) -> None:
        data, scale, offset, _, shape, dtype = node.args
        assert isinstance(data, fx.Node)
        bits = STORAGE_BITS[storage]
        entries = torch.arange(2**bits)
        if storage.startswith("int"):
            entries = torch.where(entries >= 2 ** (bits - 1), entries - 2**bits, entries)
        kind = torch.int8 if storage.startswith("int") else torch.uint8
        rank = len(shape)  # type: ignore[arg-type]
        lut = entries.to(kind).reshape([1] * rank + [2**bits, 1])
        base = str(data.target).removesuffix("_quantized")
        indices = edit.constant(f"{base}_indices", edit.value(data), like=node)
        table = edit.constant(f"{base}_lut", lut, like=node)
        whole = edit.call(_ops.lut_to_dense.default, indices, table, bits, shape, like=node)
        dense = edit.call(
            _ops.shift_scale.default, whole, scale, offset, "float", shape, dtype, like=node
        )
        edit.replace(node, dense)
        edit.drop(data)
