"""FoldPadding: zeros around the input of a convolution become padding of the convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx
from typing_extensions import override

from graphopt.ir import op_info
from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass

__all__ = ["FoldPadding"]


@dataclass(frozen=True)
class FoldPadding(Pass):
    """Let convolutions pad what ops of their own pad with zeros in front of them, and drop empty padding.

    A value that is padded on its way to a convolution would be rounded before and behind, and few targets
    pad integers. Padding stays where it is of another kind or value, where something else reads it, and
    where its two sides differ, which convolutions cannot say.

    Before:
        %p = pad(%x, [1, 1, 1, 1])
        %y = conv2d(%p, %w, %b, [2, 2])

    After:
        %y = conv2d(%x, %w, %b, [2, 2], [1, 1])

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.ZeroPad2d(1), torch.nn.Conv2d(3, 8, 3))
        >>> gm = graphopt.capture(net, torch.randn(1, 3, 8, 8)).graph_module
        >>> FoldPadding()(gm).modified, [n.name for n in gm.graph.nodes if n.op == "call_function"]
        (True, ['conv2d'])
    """

    name: ClassVar[str] = "fold-padding"

    @override
    def run(self, edit: Editor) -> None:
        for node in list(edit.gm.graph.nodes):
            added = _zeros(node)
            if added is None:
                continue
            if not any(added):
                edit.replace(node, node.args[0])
                continue
            readers = {reader: _padding(reader, node, added) for reader in node.users}
            if not readers or any(padding is None for padding in readers.values()):
                continue
            for reader, padding in readers.items():
                edit.set_args(reader, _args(reader, node.args[0], padding))
            edit.erase(node)


def _zeros(node: fx.Node) -> list[int] | None:
    """By how much a node pads a value with zeros that nothing writes to in between."""
    added = op_info.zeros_added(node)
    return None if added is None or _is_stored(node.args[0]) else added


def _is_stored(value: Any) -> bool:
    """Whether a value is, or shares the memory of, a tensor that the graph may write to in between."""
    while isinstance(value, fx.Node) and value.op == "call_function":
        info = op_info.info_of(value)
        if info is None or info.view is None:
            return False
        value = value.args[0]
    return not isinstance(value, fx.Node) or value.op == "get_attr"


def _padding(reader: fx.Node, padded: fx.Node, added: list[int]) -> list[int] | None:
    """What a convolution pads by, what is in front of it among it; None where it cannot, or is none."""
    info = op_info.info_of(reader)
    places = None if info is None else info.convolution
    if places is None or places.transposed or reader.kwargs:
        return None
    own: Any = op_info.argument(reader, places.padding, 0)
    once = reader.args[0] is padded and padded not in reader.args[1:]
    if not once or isinstance(own, str):
        return None
    per_axis = list(own) if isinstance(own, list | tuple) else [own]
    wider = per_axis * (places.ndim if len(per_axis) == 1 else 1)
    pairs = list(zip(added[::2], added[1::2], strict=True))
    if any(before != behind or before < 0 for before, behind in pairs):
        return None
    if any(any(pair) for pair in pairs[places.ndim :]):
        return None  # of channels or the batch
    for axis, (before, _) in zip(reversed(range(places.ndim)), pairs, strict=False):
        wider[axis] += before
    return wider


def _args(conv: fx.Node, data: Any, padding: Any) -> tuple[Any, ...]:
    """The arguments of a convolution with other data and padding."""
    info = op_info.info_of(conv)
    assert info is not None
    places = info.convolution
    assert places is not None
    whole = (data, conv.args[1], None, [1] * places.ndim)[: places.padding]
    given = (data, *conv.args[1:])
    upto = (*given[: places.padding], *whole[len(given) :])
    return (*upto, padding, *given[places.padding + 1 :])
