"""Padding of rounded values in front of convolutions, in the form that XNNPACK takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from typing_extensions import override

from graphopt.backends.executorch.integer_kernels import (
    DEQUANTIZE,
    QUANTIZE,
    is_rounded,
    only_user,
)
from graphopt.backends.executorch.kernels import CONVOLUTIONS
from graphopt.backends.executorch.legalize import LegalizeForXNNPACK
from graphopt.ir import op_info
from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass

__all__ = ["PadIntegers"]


@dataclass(frozen=True)
class PadIntegers(Pass):
    """Drop the rounding between padding with zeros and two-dimensional convolutions.

    Padded values lie on the grid of what is padded, zero among them, so that rounding them again
    changes nothing. XNNPACK's partitioner looks for padding right in front of a convolution, one for
    each, and computes both with integers.

    Before:
        %d = dequantize_per_tensor(%q, s, z, −128, 127, int8)
        %p = pad(%d, [0, 1, 0, 1])
        %r = quantize_per_tensor(%p, s, z, −128, 127, int8)
        %e = dequantize_per_tensor(%r, s, z, −128, 127, int8)
        %y = conv2d(%e, %w, %b, [2, 2])

    After:
        %d = dequantize_per_tensor(%q, s, z, −128, 127, int8)
        %p = pad(%d, [0, 1, 0, 1])
        %y = conv2d(%p, %w, %b, [2, 2])
    """

    name: ClassVar[str] = "pad-integers"
    after: ClassVar[tuple[type[Pass], ...]] = (LegalizeForXNNPACK,)

    @override
    def run(self, edit: Editor) -> None:
        for node in list(edit.gm.graph.nodes):
            if node.op != "call_function" or not _pads_an_image(node):
                continue
            rounded = _rounded_again(node)
            if rounded is None:
                continue
            for conv in list(rounded.users):
                if conv.args[0] is rounded and _takes_padding(conv):
                    own = edit.call(node.target, *node.args, like=node, before=conv, **node.kwargs)
                    edit.set_args(conv, (own, *conv.args[1:]))


def _pads_an_image(node: fx.Node) -> bool:
    """Whether a node adds zeros, and nothing else, along the last two axes of a rounded value."""
    added = op_info.zeros_added(node)
    if added is None or min(added, default=0) < 0 or any(added[4:]):
        return False
    return is_rounded(node.args[0])


def _rounded_again(node: fx.Node) -> fx.Node | None:
    """What a value is rounded to on the grid that it lies on already."""
    stored = only_user(node)
    if stored is None or str(stored.target) != QUANTIZE:
        return None
    rounded, source = only_user(stored), node.args[0]
    if rounded is None or str(rounded.target) != DEQUANTIZE or not isinstance(source, fx.Node):
        return None
    same = stored.args[1:] == source.args[1:] == rounded.args[1:]
    return rounded if same and not rounded.kwargs else None


def _takes_padding(conv: fx.Node) -> bool:
    if conv.target not in CONVOLUTIONS:
        return False
    info = op_info.info_of(conv)
    places = None if info is None else info.convolution
    return places is not None and places.ndim == 2 and not places.transposed
