"""What tuning moves: stored tensors, table entries, scales and zero points, and how each may move.

Scales of activations get the gradient of LSQ (Esser et al., arXiv 1902.08153, equation 3), zero points
that of LSQ+ (Bhalgat et al., arXiv 2004.09576, equation 4), here for zero points that are integers in
every step, so that a step computes what the program will. A scale moves as a factor, `start · exp(v)`:
it stays positive. The factor that LSQ scales gradients by is left out, since Adam divides by their
magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.analysis.quantized import quantized_ops
from graphopt.ir.annotations import ActivationPoint, rounding_of
from graphopt.ir.captured_module import CapturedModule, holder_of
from graphopt.ir.editor import Editor
from graphopt.ir.torch_private import learnable_per_channel, learnable_per_tensor
from graphopt.numerics.affine import SMALLEST_SCALE, has_whole_offsets
from graphopt.run.placing import device_of_graph
from graphopt.specs import QuantizationScheme

__all__ = ["Moving", "Rounding", "find_roundings", "straight_through"]


@dataclass(eq=False)
class Moving:
    """A tensor that tuning moves by steps of a unit of its own.

    Attributes:
        start: Its value before, float32.
        unit: What it moves by at a learning rate of one, broadcastable; 0 leaves it as it is. Of a
            factor it is relative.
        factor: Whether it moves as `start · exp(v)`.
        limits: Least and largest value where it is an integer, rounded with a straight-through gradient.
        v: What the optimizer moves, in units.
    """

    start: Tensor
    unit: Tensor | float
    factor: bool = False
    limits: tuple[float, float] | None = None
    v: nn.Parameter = field(init=False)

    def __post_init__(self) -> None:
        moves = bool(torch.as_tensor(self.unit).any())
        self.v = nn.Parameter(torch.zeros_like(self.start), requires_grad=moves)

    def now(self) -> Tensor:
        """The value, with the gradient to what moves it."""
        if self.factor:
            return (self.start * (self.v * self.unit).exp()).clamp_min(SMALLEST_SCALE)
        value = self.start + self.v * self.unit
        if self.limits is None:
            return value
        return value.detach().round().clamp(*self.limits) + (value - value.detach())


def straight_through(values: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `values`."""
    return values + (rounded - values).detach()


@dataclass(eq=False)
class Rounding:
    """Activations that share a scale and a zero point.

    Attributes:
        name: Name of the sharing group; "" where it is not known.
        ends: Least and largest stored value.
        scale: [] or one per channel.
        zero: Of the same shape.
        axis: Axis of the channels, None for one scale.
        pairs: The ops that quantize, each with those that dequantize what it gives.
    """

    name: str
    ends: tuple[int, int]
    scale: Moving
    zero: Moving
    axis: int | None
    pairs: list[tuple[fx.Node, list[fx.Node]]]

    def round(self, x: Tensor) -> Tensor:
        """`x` rounded, with gradients for it, the scale and the zero point."""
        low, high = self.ends
        # torch's kernel cuts negative zero points off towards zero in its backward pass
        zero, span = self.zero.now() - low, high - low
        wide = x.float()
        if self.axis is None:
            scale = self.scale.now()
            made = learnable_per_tensor(wide, scale.reshape(1), zero.reshape(1), 0, span, 1.0)
        else:
            axis = self.axis % x.ndim
            made = learnable_per_channel(wide, self.scale.now(), zero, axis, 0, span, 1.0)
        return made.to(x.dtype)

    def store(self, edit: Editor) -> tuple[Tensor, Tensor]:
        """Write scale and zero point into the graph; returns them."""
        scale, zero = self.scale.now().detach(), self.zero.now().detach()
        for quantize, readers in self.pairs:
            for node in (quantize, *readers):
                if self.axis is None:
                    around = (float(scale), int(zero))
                    edit.set_args(node, (node.args[0], *around, *node.args[3:]))
                    continue
                held: Any = node.args[1:3]
                edit.set_value(held[0], scale.clone())
                edit.set_value(held[1], zero.to(torch.int64))
        return scale, zero


def find_roundings(
    gm: CapturedModule, nodes: Sequence[fx.Node], units: tuple[float, float]
) -> list[Rounding]:
    """The activations that are rounded with fixed scales inside a part of a graph.

    Scales move where the annotation that asked for them leaves their range open, zero points where
    neither end of it is given and the scheme has any.

    Args:
        gm: The graph.
        nodes: The part; what is dequantized elsewhere stays as it is.
        units: Of scales, and of zero points, which is relative to the number of steps.
    """
    ops = quantized_ops()
    quantize = {ops.quantize_per_tensor.default, ops.quantize_per_channel.default}
    decode = {ops.dequantize_per_tensor.default, ops.dequantize_per_channel.default}
    inside, groups = set(nodes), dict[str, Rounding]()
    for node in nodes:
        readers = list(node.users)
        if node.target not in quantize or not readers:
            continue
        if not all(user.target in decode and user in inside for user in readers):
            continue
        point = rounding_of(node)
        key = node.name if point is None else point.group
        if key not in groups:
            groups[key] = _rounding(gm, node, point, units)
        groups[key].pairs.append((node, readers))
    return list(groups.values())


def _rounding(
    gm: CapturedModule, node: fx.Node, point: ActivationPoint | None, units: tuple[float, float]
) -> Rounding:
    """What an op that quantizes rounds by; where nobody knows what asked for it, it stays."""
    held: Any = node.args
    channels = node.target is quantized_ops().quantize_per_channel.default
    low, high = held[4:6] if channels else held[3:5]
    ends, axis = (int(low), int(high)), int(held[3]) if channels else None
    scale, zero = _value(gm, held[1]), _value(gm, held[2])
    if point is None:
        still = Moving(scale, 0.0, factor=True), Moving(zero, 0.0, limits=ends)
        return Rounding("", ends, *still, axis, [])
    given = [end is not None for end in point.spec.float_range]
    affine = point.spec.qscheme is QuantizationScheme.ASYMMETRIC
    shifts = affine and has_whole_offsets(point.spec) and not any(given)
    return Rounding(
        point.group,
        ends,
        Moving(scale, 0.0 if all(given) else units[0], factor=True),
        Moving(zero, units[1] * (high - low) if shifts else 0.0, limits=ends),
        axis,
        [],
    )


def _value(gm: CapturedModule, held: Any) -> Tensor:
    if not isinstance(held, fx.Node):
        return torch.tensor(float(held)).to(device_of_graph(gm))
    holder, name = holder_of(gm, str(held.target))
    tensor: Tensor = getattr(holder, name)
    return tensor.detach().float()
