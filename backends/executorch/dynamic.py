"""Roundings with a scale per row, and the linear layers that XNNPACK computes of them with integers."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from typing_extensions import override

from graphopt.analysis.quantized import quantized_ops
from graphopt.backends.executorch.kernels import LINEAR
from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass

__all__ = ["RowsByRange", "reads_rows_by_range"]

_ours = torch.ops.graphopt
_FROM_ROWS = "quantized_decomposed.dequantize_per_token.default"


@dataclass(frozen=True)
class RowsByRange(Pass):
    """Write what linear layers read, in int8 with a scale per row, in the ops that XNNPACK knows.

    Before:
        %r = round_by_range(%x, [1, -1], "int8", "asymmetric", False)
        %y = linear(%r, %w)

    After:
        %scale, %zero = choose_qparams_per_token_asymmetric(%x, int8)
        %q = quantize_per_token(%x, %scale, %zero, -128, 127, int8)
        %r = dequantize_per_token(%q, %scale, %zero, -128, 127, int8, float32)
        %y = linear(%r, %w)

    Each layer gets ops of its own, which its delegate takes. Ranges below 3e-5 have a scale of 1e-7
    there. XNNPACK computes with scales per row whatever the ops say, so that other roundings are left
    as they are.
    """

    name: ClassVar[str] = "rows-by-range"
    tolerance: ClassVar[float | None] = 1e-2

    @override
    def run(self, edit: Editor) -> None:
        for node in list(edit.calls(_ours.round_by_range.default)):
            for reader in list(node.users):
                if reader.target in LINEAR and reader.args[0] is node and _is_per_row(node):
                    edit.set_operand(reader, 0, _rounded(edit, node, reader))
            if not node.users:
                edit.erase(node)


def reads_rows_by_range(linear: fx.Node) -> bool:
    """Whether a layer reads what `RowsByRange` wrote."""
    x = linear.args[0]
    return isinstance(x, fx.Node) and str(x.target) == _FROM_ROWS


def _is_per_row(node: fx.Node) -> bool:
    given: tuple[Any, ...] = tuple(node.args)
    _, blocks, storage, scheme, minimum = given
    value = node.meta["val"]
    sizes = list(blocks)
    rows = value.ndim > 1 and sizes == [1] * (value.ndim - 1) + [-1]
    kind = (str(storage), str(scheme), bool(minimum))
    return rows and kind == ("int8", "asymmetric", False) and value.dtype is torch.float32


def _rounded(edit: Editor, node: fx.Node, reader: fx.Node) -> fx.Node:
    ops = quantized_ops()
    x, limits = node.args[0], (-128, 127, torch.int8)
    place = {"like": node, "before": reader}
    chosen = edit.call(ops.choose_qparams_per_token_asymmetric.default, x, torch.int8, **place)
    scale, zero = (edit.call(operator.getitem, chosen, number, **place) for number in (0, 1))
    stored = edit.call(ops.quantize_per_token.default, x, scale, zero, *limits, **place)
    rest = (scale, zero, *limits, torch.float32)
    return edit.call(ops.dequantize_per_token.default, stored, *rest, **place)
