"""Products with what is permuted and then reshaped, which Core AI's optimizer takes for a transpose."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch.export import ExportedProgram

__all__ = ["keep_merged_axes"]

_TIMES = torch.ops.aten.mul.Tensor
_PRODUCTS = {
    "aten.mm": 1,
    "aten.bmm": 1,
    "aten.matmul": 1,
    "aten.linear": 1,
    "aten.addmm": 2,
    "aten.baddbmm": 2,
}
_TURNS = {"aten.permute", "aten.transpose", "aten.t"}
_RESHAPES = {"aten.view", "aten.reshape", "aten._unsafe_view"}
_OTHERS = {
    "aten.unsqueeze",
    "aten.squeeze",
    "aten.clone",
    "aten.expand",
    "aten.alias",
    "aten.select",
}
_JOINS = {"aten.stack", "aten.cat"}  # of parts along the last axis: a permutation, too


def keep_merged_axes(exported: ExportedProgram) -> None:
    """Multiply by 1 what a product reads on its right if its last axis is merged from permuted ones, in place.

    Core AI 1.0b3 folds `w.permute(1, 2, 0).reshape(16, 64)` of a [4, 16, 16] into the product `x @ …` as a
    transpose, whose shape it has by chance, and computes something else; so it does with
    `einsum("td,edf->tef", x, w)` of a mixture of experts. Constants are folded first, and right; those that are
    compressed are not. Axes that are merged in front of the last one, as attention merges batch and heads, are right.

    Args:
        exported: Decomposed for Core AI.
    """
    for node in list(exported.graph.nodes):
        place = _PRODUCTS.get(_name(node))
        if place is None or not isinstance(operand := node.args[place], fx.Node):
            continue
        for reshape in _views(operand):
            source = reshape.args[0]
            if _name(reshape) in _RESHAPES and _merges(reshape, source) and _is_turned(source):
                value = reshape.meta["val"]
                with exported.graph.inserting_after(reshape):
                    one = 1.0 if value.dtype.is_floating_point else 1
                    same = exported.graph.call_function(_TIMES, (reshape, one))
                same.meta.update(reshape.meta)
                for reader in [reader for reader in reshape.users if reader is not same]:
                    reader.replace_input_with(reshape, same)
                break


def _name(node: fx.Node) -> str:
    """Of an op, without its overload."""
    return str(node.target).rpartition(".")[0] if node.op == "call_function" else ""


def _views(node: fx.Node) -> Iterator[fx.Node]:
    """The views of which a value is one, last first."""
    while _name(node) in _TURNS | _RESHAPES | _OTHERS:
        yield node
        node = node.args[0]  # type: ignore[assignment]


def _merges(reshape: fx.Node, source: object) -> bool:
    assert isinstance(source, fx.Node)
    return bool(reshape.meta["val"].shape[-1:] != source.meta["val"].shape[-1:])


def _is_turned(node: object) -> bool:
    assert isinstance(node, fx.Node)
    views = list(_views(node))
    source = views[-1].args[0] if views else node
    assert isinstance(source, fx.Node)
    return _name(source) in _JOINS or any(_name(view) in _TURNS for view in views)
