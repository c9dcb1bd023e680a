"""A block of a compressed graph as a function of what tuning moves in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.partition import Block
from graphopt.fitting.moving import Moving, Rounding, find_roundings, straight_through
from graphopt.ir import op_info
from graphopt.ir.annotations import is_rescaled, record_of, replace_activations
from graphopt.ir.editor import Editor, operands
from graphopt.numerics.blocks import Blocks
from graphopt.numerics.packing import unpack
from graphopt.run.block_forward import BlockForward
from graphopt.run.interpreter import Value
from graphopt.run.layerwise import LayerwiseRun

__all__ = ["TunedBlock"]

_ours = torch.ops.graphopt
_LUT_TO_DENSE, _SHIFT_SCALE = _ours.lut_to_dense.default, _ours.shift_scale.default
_ROUNDED_OTHERWISE = (_ours.round_by_range.default, _ours.round_to_float.default)
_INTEGERS = {"int8": (-128.0, 127.0), "uint8": (0.0, 255.0)}
# units of learning rates: biases and norms by their spread, beside rounded activations finer ones;
# scales and constants that migrated relative; zero points by their grid
_COARSE, _FINE = 0.2, 0.03
_SCALE, _ZERO = 0.1, 0.01


class TunedBlock:
    """A block, what moves in it, and the dense weights that it computes from that.

    Args:
        run: A run that has come to the block.
        block: The block.
    """

    def __init__(self, run: LayerwiseRun, block: Block) -> None:
        self.run = run
        self.forward = BlockForward(run, block)
        self.stored: dict[str, Moving] = {}
        self.entries: dict[fx.Node, Moving] = {}
        self._dense: dict[fx.Node, Callable[[dict[fx.Node, Any]], Any]] = {}
        self.roundings = find_roundings(run.gm, block.nodes, (_SCALE, _ZERO))
        self._unit = _FINE if self.roundings else _COARSE
        self._passing: dict[fx.Node, Rounding | None] = {}
        for rounding in self.roundings:
            for quantize, readers in rounding.pairs:
                self._passing[quantize] = None
                self._passing.update(dict.fromkeys(readers, rounding))
        for node in self.forward.constants_read:
            if node.op == "get_attr":
                self._take_tensor(node)
            elif node.target is _LUT_TO_DENSE:
                self._dense[node] = partial(_dense_value, node, _element_numbers(run, node))
            elif node.target is _SHIFT_SCALE:
                self._take_entries(node)
        self._fix_others()

    def _take_tensor(self, node: fx.Node) -> None:
        """A table, a bias, a norm's gain or shift, or a scale that migrated."""
        value = self.run.constant(node)
        path = str(node.target)
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            return
        exact = value.detach().float().clone()
        user = next(iter(node.users), None)
        if path in self.stored or user is None:
            return
        place = user.args.index(node) if node in user.args else -1
        if user.target is _LUT_TO_DENSE and place == 1:
            if (gap := _median_gap(exact)) > 0:
                self.stored[path] = Moving(exact, gap)
        elif is_rescaled(node) and bool((exact > 0).all()) and _multiplies(user):
            self.stored[path] = Moving(exact, self._unit, factor=True)
        elif is_rescaled(node) or place in _tuned_places(user):
            spread = max(float(exact.std()) if exact.numel() > 1 else 0.0, 1e-2)
            self.stored[path] = Moving(exact, self._unit * spread)

    def _take_entries(self, node: fx.Node) -> None:
        """Integer entries of a table."""
        given: Any = node.args
        data, scale, offset, storage, shape, dtype = given
        read = any(user.target is _LUT_TO_DENSE for user in node.users)
        held = isinstance(data, fx.Node) and data.op == "get_attr" and offset is None
        if not read or not held or storage not in _INTEGERS:
            return
        step = self.run.constant(scale)
        ones = torch.ones_like(step, dtype=torch.float32)
        entries = _SHIFT_SCALE(self.run.constant(data), ones, None, storage, shape, torch.float32)
        low, high = _INTEGERS[str(storage)]
        gap = _median_gap(entries)
        if gap > 0:
            # one unit is a whole entry at least: what moves less is rounded back
            moving = self.entries[node] = Moving(entries, max(gap, 1.0), limits=(low, high))
            wide = Blocks(tuple(entries.shape), tuple(step.shape)).spread(step.float())
            self._dense[node] = lambda _: (moving.now() * wide).to(dtype)

    def _fix_others(self) -> None:
        """Compute once what nothing that moves has a part in."""
        moving: set[fx.Node] = set()
        for node in self.forward.constants_read:
            own = node in self.entries or str(node.target) in self.stored
            if own or any(operand in moving for operand in operands(node)):
                moving.add(node)
        values = self.forward.constants({})
        for node, value in values.items():
            if node.op != "get_attr" and node not in moving:
                self._dense[node] = partial(_same, value)

    @property
    def moving(self) -> list[Moving]:
        """Everything that moves."""
        rounded = [part for each in self.roundings for part in (each.scale, each.zero)]
        every = [*self.stored.values(), *self.entries.values(), *rounded]
        return [each for each in every if each.v.requires_grad]

    def constants(self) -> dict[fx.Node, Any]:
        """Values of the constants, once for a step."""
        given = {path: moving.now() for path, moving in self.stored.items()}
        return self.forward.constants(given, self._dense)

    def __call__(self, constants: Mapping[fx.Node, Any], number: int) -> list[Tensor]:
        """Outputs of the block for one batch."""
        return self.forward(constants, number, self._call)

    def _call(self, node: fx.Node, value: Value) -> Any:
        if node in self._passing:
            rounding, x = self._passing[node], value(operands(node)[0])
            if rounding is None:
                return x
            out: Any = node.kwargs.get("out_dtype")
            return rounding.round(x).to(x.dtype if out is None else out)
        made = self.run.interpreter.call(node, value)
        if node.target in _ROUNDED_OTHERWISE:
            return straight_through(value(operands(node)[0]), made)
        return made

    def store(self) -> None:
        """Write what has moved into the graph and its record."""
        edit = Editor(self.run.gm)
        nodes = {str(node.target): node for node in self.forward.constants_read}
        for path, moving in self.stored.items():
            node = nodes[path]
            edit.set_value(node, moving.now().detach().to(edit.value(node).dtype))
        for node, moving in self.entries.items():
            whole = moving.now().detach().to(torch.int16) & 255
            edit.set_value(operands(node)[0], whole.to(torch.uint8).reshape(-1))
        values = {}
        for rounding in self.roundings:
            if rounding.scale.v.requires_grad or rounding.zero.v.requires_grad:
                values[rounding.name] = rounding.store(edit)
        rows = [
            replace(row, scale=float(values[row.name][0]), offset=float(values[row.name][1]))
            for row in record_of(self.run.gm).activations
            if row.name in values and row.scale is not None
        ]
        replace_activations(self.run.gm, rows)


def _same(value: Any, values: dict[fx.Node, Any]) -> Any:
    del values
    return value


def _median_gap(table: Tensor) -> float:
    gaps = table.sort(dim=-2).values.diff(dim=-2)
    return float(gaps[gaps > 0].median()) if bool((gaps > 0).any()) else 0.0


def _multiplies(node: fx.Node) -> bool:
    info = op_info.info_of(node)
    return info is not None and "mul" in info.names


def _tuned_places(node: fx.Node) -> tuple[int, ...]:
    """Places of an op's bias, or of a norm's gain and shift."""
    info = op_info.info_of(node)
    if info is None:
        return ()
    norm = () if info.norm is None else (info.norm.gain, info.norm.shift)
    places = (*norm, *(bias.position for bias in info.biases))
    return tuple(place for place in places if place is not None)


class _Gather(torch.autograd.Function):
    """`table[codes]` whose backward pass sums by code."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.length = table.shape[0]
        return table.index_select(0, codes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (codes,) = ctx.saved_tensors
        (gradient,) = gradients
        total = gradient.new_zeros(ctx.length, *gradient.shape[1:])
        return total.index_add_(0, codes, gradient), None


def _element_numbers(run: LayerwiseRun, node: fx.Node) -> Tensor:
    """For each code of a palettized weight, the row of the flattened tables that it reads, int32."""
    indices, lut = (run.constant(operand) for operand in operands(node)[:2])
    n_bits, shape = node.args[2], list(node.args[3])  # type: ignore[arg-type]
    assert isinstance(n_bits, int)
    axis = node.args[4] if len(node.args) > 4 else None
    if isinstance(axis, int):
        shape[axis] //= lut.shape[-1]
    codes = unpack(indices, n_bits, math.prod(shape)).reshape(shape).int()
    counts = lut.shape[:-2]
    offset = torch.zeros([1] * len(shape), dtype=torch.int32, device=codes.device)
    stride = 1
    for place in reversed(range(len(shape))):
        number = torch.arange(shape[place], dtype=torch.int32, device=codes.device)
        number = number // (shape[place] // counts[place])
        offset = offset + stride * number.reshape(
            [-1 if i == place else 1 for i in range(len(shape))]
        )
        stride *= counts[place]
    return (offset * lut.shape[-2] + codes).reshape(-1)


def _dense_value(node: fx.Node, codes: Tensor, values: dict[fx.Node, Any]) -> Tensor:
    lut = values[operands(node)[1]]
    shape: list[int] = list(node.args[3])  # type: ignore[arg-type]
    axis = node.args[4] if len(node.args) > 4 else None
    entries = _Gather.apply(lut.reshape(-1, lut.shape[-1]), codes)
    if not isinstance(axis, int):
        return entries.reshape(shape)
    length = lut.shape[-1]
    folded = [size // length if place == axis else size for place, size in enumerate(shape)]
    return entries.reshape(*folded, length).movedim(-1, axis + 1).reshape(shape)
