"""Every op with a weight as a product of matrices, so that one algorithm serves them all.

`rows[b, g, p] = weight_matrix[g] @ columns[b, g, p]` for each sample b, channel group g and position
p: a convolution's columns are its unfolded windows, a linear layer's are its inputs. Statistics
(second moments of columns, gradients per sample) and fits (error feedback) are written once
against this form.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from typing_extensions import override

from graphopt.analysis.view_steps import ViewStep
from graphopt.analysis.weights import WeightTensor, source_of, state_operands
from graphopt.ir import op_info
from graphopt.ir.editor import operands
from graphopt.ir.op_info import ConvolutionArguments, WeightSlot

__all__ = ["LooseUse", "MatrixForm", "MatrixUse", "WeightUse", "matrix_form", "weight_uses"]


@dataclass(frozen=True)
class MatrixForm:
    """How one op's weight, input and output map to matrices.

    Attributes:
        kind: "linear" (x @ Wᵀ), "right" (x @ W), "left" (W @ x), "conv", "transposed" or "embedding".
        data: Position of the input among the op's arguments.
        groups: Channel groups of a convolution.
        kernel: Its kernel size.
        stride: Its stride.
        padding: (before, after) per spatial dimension.
        dilation: Its dilation.
    """

    kind: str
    data: int = 0
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()

    def matrix(self, weight: Tensor) -> Tensor:
        """The op's weight operand as [groups, rows, columns]."""
        if self.kind in ("linear", "left"):
            return weight[None]
        if self.kind in ("right", "embedding"):
            return weight.T[None]
        if self.kind == "conv":
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        split = weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
        return split.permute(0, 3, 2, 1).flatten(1, 2)  # output channels run fastest

    def operand(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """Inverse of `matrix`: a weight operand of `shape`."""
        if self.kind in ("linear", "left"):
            return matrix[0]
        if self.kind in ("right", "embedding"):
            return matrix[0].T
        if self.kind == "conv":
            return matrix.reshape(list(shape))
        size = math.prod(self.kernel)
        split = matrix.reshape(self.groups, size, shape[1], -1)
        return split.permute(0, 3, 2, 1).reshape(list(shape))

    def columns(self, x: Tensor) -> Tensor:
        """The op's input as [batch, groups, positions, columns]; not for lookups."""
        if self.kind in ("linear", "right"):
            return _positions(x)
        if self.kind == "left":
            return _positions(x.transpose(-1, -2))
        batched = x if x.ndim == len(self.kernel) + 2 else x[None]
        if self.kind == "conv":
            return self._unfold(batched)
        return batched.reshape(batched.shape[0], self.groups, -1, batched[0, 0].numel()).mT

    def count(self, x: Tensor) -> tuple[int, int, int]:
        """Samples, positions and columns that `columns` would have."""
        if self.kind == "conv":
            batched = x if x.ndim == len(self.kernel) + 2 else x[None]
            shape = self._windows(batched.to("meta")).shape
            rank = len(self.kernel)
            size = math.prod(shape[2 + rank :]) * shape[1] // self.groups
            return shape[0], math.prod(shape[2 : 2 + rank]), size
        batch, _, positions, size = self.columns(x).shape  # a view
        return batch, positions, size

    def sampled(self, x: Tensor, at: Tensor) -> Tensor:
        """Some positions of `columns`, [groups, positions, columns], without making the others.

        Args:
            x: The op's input.
            at: Positions, counted over the whole batch, int64.
        """
        if self.kind != "conv":
            columns = self.columns(x)
            batch, place = at // max(columns.shape[2], 1), at % max(columns.shape[2], 1)
            return columns[batch, :, place].transpose(0, 1)
        rank = len(self.kernel)
        batched = x if x.ndim == rank + 2 else x[None]
        windows = self._windows(batched).unflatten(1, (self.groups, -1))
        batch, *places = torch.unravel_index(at, (len(windows), *windows.shape[3 : 3 + rank]))
        order = [0, *range(3, 3 + rank), 1, 2, *range(3 + rank, 3 + 2 * rank)]
        return windows.permute(order)[(batch, *places)].flatten(2).transpose(0, 1)

    def rows(self, gradient: Tensor, x: Tensor) -> Tensor:
        """A gradient of the op's output as [batch, groups, positions, rows].

        Args:
            gradient: Shape of the output.
            x: The op's input.
        """
        if self.kind in ("linear", "right", "embedding"):
            return _positions(gradient)
        if self.kind == "left":
            return _positions(gradient.transpose(-1, -2))
        batched = gradient if gradient.ndim == len(self.kernel) + 2 else gradient[None]
        if self.kind == "conv":
            return batched.reshape(batched.shape[0], self.groups, -1, batched[0, 0].numel()).mT
        sizes = x.shape[-len(self.kernel) :]
        windows = self._windows(batched, sizes)  # batch, channels, *sizes, *kernel
        rank = len(self.kernel)
        split = windows.unflatten(1, (self.groups, -1))
        order = [0, 1, *range(3, 3 + rank), *range(3 + rank, 3 + 2 * rank), 2]
        return split.permute(order).flatten(2 + rank).flatten(2, 1 + rank)

    @property
    def is_even_convolution(self) -> bool:
        """Whether it is a convolution that torch's own backward kernel takes."""
        return self.kind == "conv" and all(before == behind for before, behind in self.padding)

    def convolution_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Gradient of an even convolution's weight, without unfolding its input.

        Args:
            gradient: Shape of the output, [batch, channels, *positions].
            x: The op's input, of the same dtype.

        Returns:
            Shape of the weight, summed over the batch.
        """
        rank = len(self.kernel)
        like = x.new_empty([gradient.shape[1], x.shape[1] // self.groups, *self.kernel])
        padding = [before for before, _ in self.padding]
        gradients = torch.ops.aten.convolution_backward.default(
            gradient,
            x,
            like,
            None,
            list(self.stride),
            padding,
            list(self.dilation),
            False,
            [0] * rank,
            self.groups,
            [False, True, False],
        )
        return gradients[1]

    def _unfold(self, x: Tensor) -> Tensor:
        rank = len(self.kernel)
        windows = self._windows(x).unflatten(1, (self.groups, -1))
        order = [0, 1, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank)]
        return windows.permute(order).flatten(2 + rank).flatten(2, 1 + rank)

    def _windows(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Strided view [batch, channels, *positions, *kernel] of the padded `x`."""
        rank = len(self.kernel)
        padding = [extent for pair in reversed(self.padding) for extent in pair]
        if sizes is not None:
            # a transposed convolution may have to look past its own output
            padding = []
            for place in reversed(range(rank)):
                before = self.padding[place][0]
                reach = (sizes[place] - 1) * self.stride[place] + 1
                reach += self.dilation[place] * (self.kernel[place] - 1)
                padding += [before, max(reach - before - x.shape[2 + place], 0)]
        padded = F.pad(x, padding).contiguous()
        counts = [
            (padded.shape[2 + i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i]
            + 1
            if sizes is None
            else sizes[i]
            for i in range(rank)
        ]
        steps = padded.stride()
        return padded.as_strided(
            [*padded.shape[:2], *counts, *self.kernel],
            [
                *steps[:2],
                *(step * stride for step, stride in zip(steps[2:], self.stride, strict=True)),
                *(step * gap for step, gap in zip(steps[2:], self.dilation, strict=True)),
            ],
        )


def _positions(x: Tensor) -> Tensor:
    """[batch, 1, positions, features]; the first dimension counts samples."""
    if x.ndim == 1:
        return x[None, None, None]
    return x.reshape(x.shape[0], 1, -1, x.shape[-1])


def matrix_form(node: fx.Node, position: int) -> MatrixForm | None:
    """The form of an op whose weight is argument `position`; None where it has none."""
    info = op_info.info_of(node)
    slot = None if info is None else info.slot(position)
    if info is None or slot is None or slot.matrix is None or position >= len(node.args):
        return None
    if info.convolution is not None:
        return _conv_form(node, slot, info.convolution)
    if _rank(node.args[position]) != 2:
        return None
    if slot.matrix == "left" and _rank(node.args[slot.data]) < 2:
        return None
    return MatrixForm(slot.matrix, data=slot.data)


def _conv_form(node: fx.Node, slot: WeightSlot, places: ConvolutionArguments) -> MatrixForm:
    rank = places.ndim

    def per_axis(value: Any) -> tuple[int, ...]:
        extents = tuple(value) if isinstance(value, list | tuple) else (value,)
        return extents * rank if len(extents) == 1 else extents

    shape = _shape(node.args[slot.position])
    kernel = shape[2:]
    dilation = per_axis(op_info.argument(node, places.dilation, 1))
    padding: Any = op_info.argument(node, places.padding, 0)
    if isinstance(padding, str):
        total = [
            (gap * (size - 1)) * (padding == "same")
            for gap, size in zip(dilation, kernel, strict=True)
        ]
        pairs = tuple((extent // 2, extent - extent // 2) for extent in total)
    else:
        pairs = tuple((extent, extent) for extent in per_axis(padding))
    return MatrixForm(
        "transposed" if places.transposed else "conv",
        slot.data,
        int(op_info.argument(node, places.groups, 1)),
        kernel,
        per_axis(op_info.argument(node, places.stride, 1)),
        pairs,
        dilation,
    )


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def _rank(node: Any) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, Tensor) else 0


class MatrixUse(ABC):
    """A stored tensor as the matrix of one op.

    Attributes:
        form: The op's matrix form.
    """

    form: MatrixForm

    @abstractmethod
    def steps(self) -> tuple[ViewStep, ...]:
        """Views and casts between the stored tensor and the op."""

    def operand(self, stored: Tensor, *, casts: bool = True) -> Tensor:
        """What the op reads when this is stored.

        Args:
            stored: Shape of the stored tensor; any dtype.
            casts: Follow changes of dtype as well; False keeps the dtype.
        """
        value: Any = stored
        for step in self.steps():
            if casts or not step.is_cast:
                value = step(value)
        return value

    def matrix(self, stored: Tensor, *, casts: bool = True) -> Tensor:
        """The stored tensor as [groups, rows, columns]."""
        return self.form.matrix(self.operand(stored, casts=casts))

    def pull_back(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """A quantity per matrix element as one per stored element; unused elements get 0.

        Args:
            matrix: [groups, rows, columns], floating point.
            shape: Shape of the stored tensor.
        """
        if not self.steps():
            return self.form.operand(matrix, shape)
        with torch.enable_grad():
            leaf = torch.zeros(
                list(shape), dtype=matrix.dtype, device=matrix.device, requires_grad=True
            )
            operand = self.operand(leaf, casts=False)
            made = self.form.operand(matrix, operand.shape)
            (pulled,) = torch.autograd.grad(operand, leaf, made)
        return pulled


@dataclass(frozen=True)
class LooseUse(MatrixUse):
    """A use without its graph, which other processes can take.

    Attributes:
        form: The op's matrix form.
        held: Views and casts between the stored tensor and the op.
    """

    form: MatrixForm
    held: tuple[ViewStep, ...] = ()

    @override
    def steps(self) -> tuple[ViewStep, ...]:
        return self.held


@dataclass(frozen=True)
class WeightUse(MatrixUse):
    """One op that reads a weight in a known form.

    Attributes:
        node: The op.
        position: Place of the weight among its arguments.
        form: Its matrix form.
        chain: Views and casts between the stored tensor and the op.
    """

    node: fx.Node
    position: int
    form: MatrixForm
    chain: tuple[fx.Node, ...]

    @override
    def steps(self) -> tuple[ViewStep, ...]:
        return tuple(map(ViewStep.of, self.chain))

    @property
    def data(self) -> fx.Node:
        """The op's input."""
        inputs = self.node.args[self.form.data]
        assert isinstance(inputs, fx.Node)
        return inputs

    def loose(self) -> LooseUse:
        """The same without the graph."""
        return LooseUse(self.form, self.steps())


def weight_uses(gm: fx.GraphModule, weights: Sequence[WeightTensor]) -> dict[str, list[WeightUse]]:
    """Name of the weight → its uses in a known form; a weight with another use is left out."""
    owner = {node: weight.name for weight in weights for node in weight.nodes}
    uses_by_name: dict[str, list[WeightUse]] = {weight.name: [] for weight in weights}
    unknown: set[str] = set()
    for node in gm.graph.nodes:
        for operand, position, role, axis in state_operands(node):
            source = source_of(operand, axis)
            name = None if source is None else owner.get(source.node)
            if source is None or name is None or role != "weight":
                continue
            form = matrix_form(node, position)
            if form is None:
                unknown.add(name)
            else:
                uses_by_name[name].append(WeightUse(node, position, form, source.chain))
    by_name = {weight.name: weight for weight in weights}
    return {
        name: uses
        for name, uses in uses_by_name.items()
        if uses and name not in unknown and _only_these(by_name[name].nodes, uses)
    }


def _only_these(nodes: Sequence[fx.Node], uses: Sequence[WeightUse]) -> bool:
    """Whether nothing else reads the weight, and its views do not depend on the inputs."""
    chains = {node for use in uses for node in use.chain}
    if any(used not in {*nodes, *chains} for node in chains for used in operands(node)):
        return False
    known = chains | {use.node for use in uses}
    return all(user in known or not user.users for node in (*nodes, *chains) for user in node.users)
