"""Roundings with scales of each tensor as arithmetic, for targets that have no op for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from typing_extensions import override

from graphopt.ir.editor import Editor
from graphopt.numerics.affine import Grid, grid_of
from graphopt.passes.pass_base import Pass
from graphopt.specs import QuantizationScheme, QuantizationSpec
from graphopt.specs.dtypes import parse_dtype

__all__ = ["ExpandRangeRounding"]

_aten = torch.ops.aten
_ours = torch.ops.graphopt
_Call = Callable[..., fx.Node]


@dataclass(frozen=True)
class ExpandRangeRounding(Pass):
    """Write `graphopt.round_by_range` in plain ops; products of integers are then products of floats.

    Before:
        %r = round_by_range(%x, [1, -1], "int8", "asymmetric", False)

    After:
        %low, %high = clamp(amin(%x, [-1], True), None, 0), clamp(amax(%x, [-1], True), 0)
        %scale = (%high - %low) / 255                              # 1 where it is 0
        %offset = clamp(round(-128 - %low / %scale), -128, 127)
        %r = (clamp(round(%x / %scale) + %offset, -128, 127) - %offset) * %scale

    Examples:
        >>> class Rounded(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.ops.graphopt.round_by_range(x, [1, -1], "int8", "asymmetric", False)
        >>> gm = graphopt.capture(Rounded(), example).graph_module
        >>> ExpandRangeRounding()(gm).modified
        True
        >>> bool((gm(*example)[0] - Rounded()(*example)).abs().max() < 1e-6)
        True
    """

    name: ClassVar[str] = "expand-range-rounding"
    tolerance: ClassVar[float | None] = 1e-2

    @override
    def run(self, edit: Editor) -> None:
        for node in list(edit.calls(_ours.round_by_range.default)):
            edit.replace(node, _rounded(edit, node))


def _rounded(edit: Editor, node: fx.Node) -> fx.Node:
    given: tuple[Any, ...] = tuple(node.args)
    x, blocks, storage, scheme, minimum = given
    dtype = node.meta["val"].dtype

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return edit.call(op, *args, like=node, **kwargs)

    assert isinstance(x, fx.Node)
    if dtype is not torch.float32:
        x = call(_aten._to_copy.default, x, dtype=torch.float32)
    sizes = list(blocks) or [-1] * node.meta["val"].ndim
    divided = [axis for axis, size in enumerate(sizes) if size > 1]
    for number, axis in enumerate(divided):
        place = axis + number
        x = call(_aten.unflatten.int, x, place, [-1, sizes[place]])
        sizes[place : place + 1] = [1, -1]
    spec = QuantizationSpec(dtype=parse_dtype(str(storage)), qscheme=QuantizationScheme(scheme))
    axes = [axis for axis, size in enumerate(sizes) if size == -1]
    scale, offset = _scales(call, x, axes, spec, minimum=bool(minimum))
    out = _round(call, x, scale, offset, grid_of(spec), whole=not minimum)
    for axis in divided:
        out = call(_aten.flatten.using_ints, out, axis, axis + 1)
    if dtype is not torch.float32:
        out = call(_aten._to_copy.default, out, dtype=dtype)
    return out


def _scales(
    call: _Call, x: fx.Node, axes: list[int], spec: QuantizationSpec, *, minimum: bool
) -> tuple[fx.Node, fx.Node | float | None]:
    """Scale and offset as in `numerics.affine.ranged_qparams`."""
    grid = grid_of(spec)
    span = grid.q_max - grid.q_min
    low = call(_aten.clamp_max.default, call(_aten.amin.default, x, axes, True), 0.0)
    high = call(_aten.clamp_min.default, call(_aten.amax.default, x, axes, True), 0.0)
    if spec.qscheme is QuantizationScheme.ASYMMETRIC:
        # halves first: a range of half the float range must not overflow
        parts = call(_aten.div.Tensor, high, span), call(_aten.div.Tensor, low, span)
        scale = _without_zeros(call, call(_aten.sub.Tensor, *parts))
        shift = call(_aten.neg.default, call(_aten.div.Tensor, low, scale))
        offset = call(_aten.add.Tensor, shift, grid.q_min)
        if not minimum:
            offset = call(_aten.round.default, offset)
            offset = call(_aten.clamp.default, offset, grid.q_min, grid.q_max)
        return scale, offset
    if minimum:
        size = call(_aten.maximum.default, call(_aten.neg.default, low), high)
        scale = _without_zeros(call, call(_aten.div.Tensor, size, span / 2))
        return scale, call(_aten.add.Tensor, call(_aten.div.Tensor, size, scale), grid.q_min)
    below, above = grid.middle - grid.q_min, grid.q_max - grid.middle
    parts = call(_aten.div.Tensor, low, -below), call(_aten.div.Tensor, high, above)
    scale = _without_zeros(call, call(_aten.maximum.default, *parts))
    return scale, float(grid.middle) if grid.middle else None


def _without_zeros(call: _Call, scale: fx.Node) -> fx.Node:
    zero = call(_aten.eq.Scalar, scale, 0.0)
    return call(_aten.add.Tensor, scale, call(_aten._to_copy.default, zero, dtype=torch.float32))


def _round(
    call: _Call,
    x: fx.Node,
    scale: fx.Node,
    offset: fx.Node | float | None,
    grid: Grid,
    *,
    whole: bool,
) -> fx.Node:
    # a quotient, as the reciprocal of a small scale overflows in 16 bits
    codes = call(_aten.div.Tensor, x, scale)
    if whole:
        codes = call(_aten.round.default, codes)
    if offset is not None:
        codes = call(_aten.add.Tensor, codes, offset)
    if not whole:
        codes = call(_aten.round.default, codes)
    codes = call(_aten.clamp.default, codes, grid.q_min, grid.q_max)
    if offset is not None:
        codes = call(_aten.sub.Tensor, codes, offset)
    return call(_aten.mul.Tensor, codes, scale)
