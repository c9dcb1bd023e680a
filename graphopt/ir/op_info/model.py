"""What can be said of an op: the fields of one row of the table."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from torch import fx

__all__ = [
    "Activation",
    "BatchNormArguments",
    "BiasSlot",
    "ConvolutionArguments",
    "MatrixKind",
    "NormArguments",
    "OpInfo",
    "Scales",
    "View",
    "WeightSlot",
]

MatrixKind = Literal["linear", "right", "left", "conv", "transposed", "embedding"]
_EARLIER: dict[str, MatrixKind] = {"lookup": "embedding"}  # what a kind was called before


class Scales(Enum):
    """How the scale of an op's result relates to those of its operands.

    COMPUTE: operands and result have scales of their own; a batch norm and an activation behind it
        belong to it.
    SHARE: all operands and the result have one scale.
    PASS: the result has the first operand's scale, where that operand is quantized.
    FLOAT: left in float unless a config names it.

    Examples:
        >>> from graphopt.ir.op_info import info_of
        >>> info_of(torch.ops.aten.cat.default).scales is Scales.SHARE
        True
    """

    COMPUTE = "compute"
    SHARE = "share"
    PASS = "pass"
    FLOAT = "float"


class View(Enum):
    """What an op that only rearranges its first operand does with the axes.

    KEEP: every axis stays in its place. RESHAPE: elements stay in row-major order. PERMUTE: argument
    1 is the order. TRANSPOSE: arguments 1 and 2 change places. REVERSE: the order is turned around.
    UNSQUEEZE: argument 1 is a new axis. SELECT: argument 1 is an axis that goes. EXPAND: axes come in
    front.

    Examples:
        >>> from graphopt.ir.op_info import info_of
        >>> info_of(torch.ops.aten.permute.default).view is View.PERMUTE
        True
    """

    KEEP = "keep"
    RESHAPE = "reshape"
    PERMUTE = "permute"
    TRANSPOSE = "transpose"
    REVERSE = "reverse"
    UNSQUEEZE = "unsqueeze"
    SELECT = "select"
    EXPAND = "expand"


@dataclass(frozen=True)
class WeightSlot:
    """An operand that is a weight where it is a constant.

    Attributes:
        position: Its place among the arguments.
        channel_axis: Its axis of output channels; negative ones count from the end.
        matrix: How it is a matrix: "linear" (x @ Wᵀ), "right" (x @ W), "left" (W @ x), "conv",
            "transposed" or "embedding"; None where it is none. The first three need rank 2.
        data: Place of the operand that it is multiplied with.
        bias: Place of what is added per output channel, None where the op has no such argument.
        result_axis: Axis of the result that counts the output channels.

    Examples:
        >>> from graphopt.ir.op_info import info_of
        >>> [slot] = info_of(torch.ops.aten.linear.default).weights
        >>> isinstance(slot, WeightSlot), slot.position, slot.channel_axis, slot.matrix
        (True, 1, 0, 'linear')
    """

    position: int
    channel_axis: int = 0
    matrix: MatrixKind | None = None
    data: int = 0
    bias: int | None = None
    result_axis: int = -1

    def __post_init__(self) -> None:
        now = _EARLIER.get(str(self.matrix))
        if now is not None:
            warnings.warn(
                f"WeightSlot(matrix={self.matrix!r}) is called {now!r} now", DeprecationWarning, 3
            )
            object.__setattr__(self, "matrix", now)


@dataclass(frozen=True)
class BiasSlot:
    """An operand that is a bias where it is a constant.

    Attributes:
        position: Its place among the arguments.
        channel_axis: Its axis of output channels.

    Examples:
        >>> from graphopt.ir.op_info import info_of
        >>> info_of(torch.ops.aten.conv2d.default).biases
        (BiasSlot(position=2, channel_axis=0),)
    """

    position: int
    channel_axis: int = 0


@dataclass(frozen=True)
class ConvolutionArguments:
    """Places of a convolution's arguments.

    Attributes:
        stride: Place of the stride.
        padding: Place of the padding.
        dilation: Place of the dilation.
        groups: Place of the number of channel groups.
        transposed: Whether it is a transposed one.
        ndim: Its spatial dimensions.

    Examples:
        >>> from graphopt.ir.op_info import info_of
        >>> info_of(torch.ops.aten.conv1d.default).convolution.ndim
        1
    """

    stride: int = 3
    padding: int = 4
    dilation: int = 5
    groups: int = 6
    transposed: bool = False
    ndim: int = 2


@dataclass(frozen=True)
class Activation:
    """An elementwise function that is computed with the op before it.

    Attributes:
        low: Its smallest value, None where it has none.
        bounds_from: Place of its smallest value, where that is an argument.
        homogeneous: Whether f(s·x) = s·f(x) for s > 0.

    Examples:
        >>> from graphopt.ir.op_info import info_of
        >>> info_of(torch.ops.aten.relu.default).activation
        Activation(low=0.0, bounds_from=None, homogeneous=True)
    """

    low: float | None = None
    bounds_from: int | None = None
    homogeneous: bool = False


@dataclass(frozen=True)
class NormArguments:
    """Places of what a norm multiplies by and adds; None where it has no such argument.

    Attributes:
        gain: Place of the gain.
        shift: Place of the shift.
        axis: Axis of the channels that they count.

    Examples:
        >>> from graphopt.ir.op_info import info_of
        >>> info_of(torch.ops.aten.layer_norm.default).norm
        NormArguments(gain=2, shift=3, axis=-1)
    """

    gain: int | None
    shift: int | None = None
    axis: int = -1


@dataclass(frozen=True)
class BatchNormArguments:
    """Places of a batch norm's arguments behind (x, γ, β, mean, variance).

    Attributes:
        momentum: Place of the momentum.
        eps: Place of ε.
        training: Place of the switch to the batch's own statistics, None where there is none.
        gives_tuple: Whether the normalised value is item 0 of the result.

    Examples:
        >>> from graphopt.ir.op_info import BATCH_NORM, info_of
        >>> info_of(BATCH_NORM).batch_norm
        BatchNormArguments(momentum=5, eps=6, training=None, gives_tuple=True)
    """

    momentum: int
    eps: int
    training: int | None = None
    gives_tuple: bool = False


@dataclass(frozen=True)
class OpInfo:
    """What one family of ops is.

    Attributes:
        names: What configs call it, the family first; packet and overload are added to them.
        targets: Its overloads.
        weights: Operands that are weights.
        biases: Operands that are biases.
        weight_list: Place of a list that holds all weights and biases (recurrent ops).
        convolution: Places of a convolution's arguments.
        folds_norm: Whether a batch norm behind it can be folded into it, per output channel.
        scales: How the result's scale relates to the operands'; None where nothing is known.
        data: Places of the operands that are quantized; a list counts with all its items.
        both_data: Whether it counts only with two data operands or more, as arithmetic does.
        quantizes_output: Whether its result is quantized unless a config names the op.
        activation: Set where it is an activation function.
        non_negative: Whether it gives nothing below zero.
        averages: Whether its results lie between the values of its operand.
        pools_over: Place of the axes that it averages, where it averages whole axes.
        arithmetic: Whether norms are written with it.
        attention: Its part in attention: "product", "softmax", "between" the two, or the "whole" of it.
        view: What it does with axes, where it only rearranges its first operand.
        cast: Whether it changes the type of its first operand.
        copies: Whether it gives its first operand unchanged.
        sums: Whether it adds its first two operands.
        fresh: Whether its result shares memory with no other value.
        in_place: The op that does the same in the memory of the first operand.
        fill: Place of the value that it fills with.
        norm: Places of a norm's gain and shift.
        batch_norm: Set where it is a batch norm.
        dropout: Whether it is a dropout, called with (x, rate, …).
        noise: Whether it is a leaky ReLU of random slope in training, called with (x, low, high, …).
        inner_rate: Place of the rate of a dropout inside it.
        training: Place of the switch to training.
        composite: Whether captures break it up, as its weight would be out of sight otherwise.
        check: What it checks of its operand, where it does nothing else.
        shape_query: Whether it asks for an extent of its operand only.
        kept_whole: Whether export's decomposition leaves it as it is.
        linear_if_turned: Whether it is a linear layer where its right operand is a turned matrix.
        by_node: Says of one node what the op is there, where its arguments decide.

    Examples:
        >>> relu = graphopt.ir.op_info.info_of(torch.ops.aten.relu.default)
        >>> isinstance(relu, OpInfo), relu.names[0], relu.scales
        (True, 'relu', <Scales.PASS: 'pass'>)
    """

    names: tuple[str, ...]
    targets: tuple[Any, ...]
    weights: tuple[WeightSlot, ...] = ()
    biases: tuple[BiasSlot, ...] = ()
    weight_list: int | None = None
    convolution: ConvolutionArguments | None = None
    folds_norm: bool = False
    scales: Scales | None = None
    data: tuple[int, ...] = (0,)
    both_data: bool = False
    quantizes_output: bool = True
    activation: Activation | None = None
    non_negative: bool = False
    averages: bool = False
    pools_over: int | None = None
    arithmetic: bool = False
    attention: Literal["product", "softmax", "between", "whole"] | None = None
    view: View | None = None
    cast: bool = False
    copies: bool = False
    sums: bool = False
    fresh: bool = False
    in_place: Any = None
    fill: int | None = None
    norm: NormArguments | None = None
    batch_norm: BatchNormArguments | None = None
    dropout: bool = False
    noise: bool = False
    inner_rate: int | None = None
    training: int | None = None
    composite: bool = False
    check: Literal["type", "value"] | None = None
    shape_query: bool = False
    kept_whole: bool = False
    linear_if_turned: bool = False
    by_node: Callable[[fx.Node], OpInfo] | None = None

    @property
    def has_weight(self) -> bool:
        """Whether it can take a weight."""
        return bool(self.weights) or self.weight_list is not None

    @property
    def is_product(self) -> bool:
        """Whether either of two operands may be the weight."""
        return len(self.weights) > 1

    def slot(self, position: int) -> WeightSlot | None:
        """The weight at a place among the arguments."""
        return next((slot for slot in self.weights if slot.position == position), None)
