"""What quantization knows of ops, as data: which operands count, what shares a scale, what fuses.

A new op is one line in a table here; no pass names an op.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch

__all__ = ["ACTIVATIONS", "NON_NEGATIVE", "PATTERNS", "Activation", "Kind", "OpPattern"]

_aten = torch.ops.aten


class Kind(Enum):
    """How an op's output scale relates to its operands'.

    COMPUTE: operands and output have scales of their own; a batch norm and an activation behind it
        belong to it.
    SHARE: all operands and the output have one scale.
    PASS: the output has the first operand's scale, where that operand is quantized.
    FLOAT: left in float unless a config names it.
    """

    COMPUTE = "compute"
    SHARE = "share"
    PASS = "pass"
    FLOAT = "float"


@dataclass(frozen=True)
class OpPattern:
    """One family of ops.

    Attributes:
        names: What configs call it.
        kind: How its scales relate.
        operands: Argument positions of its activations; a list argument counts with all its items.
        fuses_norm: Whether a batch norm behind it is computed with it.
        both_data: Whether it counts only with two data operands or more, as arithmetic does.
        output: Whether its output is quantized unless a config names the op.
    """

    names: tuple[str, ...]
    kind: Kind
    operands: tuple[int, ...] = (0,)
    fuses_norm: bool = False
    both_data: bool = False
    output: bool = True


@dataclass(frozen=True)
class Activation:
    """An elementwise function that is computed with the op before it.

    Attributes:
        names: What configs call it.
        low: Its smallest value, None where it has none.
        keeps_grid: Whether it maps quantized values to values of the same scale.
        bounds_from: Argument position of its smallest value, where that is an argument.
    """

    names: tuple[str, ...]
    low: float | None = None
    keeps_grid: bool = False
    bounds_from: int | None = None


def _found(overloads: str) -> list[Any]:
    ops = []
    for text in overloads.split():
        packet, _, kind = text.partition(".")
        op = getattr(getattr(_aten, packet, None), kind or "default", None)
        if op is not None:
            ops.append(op)
    return ops


def _names(name: str, op: Any) -> tuple[str, ...]:
    """What configs may call an op: its family, its own name, its overload."""
    packet = str(op).split(".")[1]
    return tuple(dict.fromkeys((name, packet, str(op))))


_CONV = OpPattern(("conv",), Kind.COMPUTE, fuses_norm=True)
_ELEMENTWISE = OpPattern(("add",), Kind.COMPUTE, (0, 1), both_data=True)
_PASS = OpPattern(("reshape",), Kind.PASS)

_TABLE: tuple[tuple[OpPattern, str, str], ...] = (
    # pattern, config name, overloads
    (_CONV, "conv1d", "conv1d.default conv1d.padding"),
    (_CONV, "conv2d", "conv2d.default conv2d.padding"),
    (_CONV, "conv3d", "conv3d.default conv3d.padding"),
    (_CONV, "conv_transpose1d", "conv_transpose1d.default"),
    (_CONV, "conv_transpose2d", "conv_transpose2d.input"),
    (_CONV, "conv_transpose3d", "conv_transpose3d.input"),
    (_CONV, "convolution", "convolution.default"),
    (OpPattern((), Kind.COMPUTE), "linear", "linear.default"),
    (OpPattern((), Kind.COMPUTE, (0, 1)), "matmul", "matmul.default mm.default bmm.default"),
    (OpPattern((), Kind.COMPUTE, (1, 2)), "addmm", "addmm.default"),
    (OpPattern((), Kind.COMPUTE, (1, 2)), "baddbmm", "baddbmm.default"),
    (
        OpPattern((), Kind.COMPUTE, (0, 1, 2)),
        "scaled_dot_product_attention",
        "scaled_dot_product_attention.default",
    ),
    # its table has scales of its own already, and no target computes with the rows
    (OpPattern((), Kind.COMPUTE, (), output=False), "embedding", "embedding.default"),
    # operands keep scales of their own: that is more precise, and no target needs them equal
    (_ELEMENTWISE, "add", "add.Tensor"),
    (_ELEMENTWISE, "sub", "sub.Tensor"),
    (_ELEMENTWISE, "mul", "mul.Tensor"),
    # averages fall between the values of their operand, so they get a scale of their own
    (
        OpPattern((), Kind.COMPUTE),
        "avg_pool",
        "avg_pool1d.default avg_pool2d.default avg_pool3d.default",
    ),
    (
        OpPattern((), Kind.COMPUTE),
        "adaptive_avg_pool",
        "adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default",
    ),
    (OpPattern((), Kind.COMPUTE), "mean", "mean.dim"),
    (
        OpPattern((), Kind.COMPUTE),
        "upsample",
        "upsample_bilinear2d.default upsample_bilinear2d.vec upsample_bicubic2d.default"
        " upsample_bicubic2d.vec",
    ),
    (OpPattern((), Kind.SHARE, (0,)), "cat", "cat.default concat.default"),
    (OpPattern((), Kind.SHARE, (0,)), "stack", "stack.default"),
    (OpPattern((), Kind.SHARE, (0, 1), both_data=True), "maximum", "maximum.default"),
    (OpPattern((), Kind.SHARE, (0, 1), both_data=True), "minimum", "minimum.default"),
    (
        _PASS,
        "max_pool",
        "max_pool1d.default max_pool2d.default max_pool3d.default adaptive_max_pool2d.default",
    ),
    (_PASS, "reshape", "view.default reshape.default _unsafe_view.default unflatten.int"),
    (_PASS, "flatten", "flatten.using_ints"),
    (_PASS, "transpose", "transpose.int t.default permute.default movedim.int numpy_T.default"),
    (_PASS, "squeeze", "squeeze.default squeeze.dim squeeze.dims unsqueeze.default expand.default"),
    (_PASS, "slice", "slice.Tensor select.int narrow.default index_select.default"),
    (_PASS, "split", "split.Tensor split_with_sizes.default chunk.default unbind.int"),
    (_PASS, "clone", "clone.default contiguous.default alias.default detach.default"),
    (_PASS, "pad", "constant_pad_nd.default reflection_pad2d.default replication_pad2d.default"),
    (
        _PASS,
        "pixel_shuffle",
        "pixel_shuffle.default pixel_unshuffle.default channel_shuffle.default",
    ),
    (
        _PASS,
        "upsample_nearest",
        "upsample_nearest1d.vec upsample_nearest2d.vec"
        " upsample_nearest2d.default upsample_nearest3d.vec",
    ),
    (_PASS, "flip", "flip.default roll.default repeat.default"),
    (OpPattern((), Kind.FLOAT), "softmax", "softmax.int _softmax.default"),
    (OpPattern((), Kind.FLOAT), "layer_norm", "layer_norm.default native_layer_norm.default"),
    (OpPattern((), Kind.FLOAT), "group_norm", "group_norm.default native_group_norm.default"),
    (OpPattern((), Kind.FLOAT), "rms_norm", "rms_norm.default"),
    (OpPattern((), Kind.FLOAT), "instance_norm", "instance_norm.default"),
    (OpPattern((), Kind.FLOAT), "div", "div.Tensor"),
    (OpPattern((), Kind.FLOAT), "pow", "pow.Tensor_Scalar"),
)

PATTERNS: dict[Any, OpPattern] = {
    op: replace(pattern, names=_names(name, op))
    for pattern, name, ops in _TABLE
    for op in _found(ops)
}

_ACTIVATION_TABLE: tuple[tuple[str, float | None, bool, int | None, str], ...] = (
    # config name, smallest value, same grid, argument of the smallest value, overloads
    ("relu", 0.0, True, None, "relu.default"),
    ("relu6", 0.0, True, None, "relu6.default"),
    ("hardtanh", None, False, 1, "hardtanh.default"),
    ("clamp", None, True, 1, "clamp.default clamp_min.default"),
    ("sigmoid", 0.0, False, None, "sigmoid.default"),
    ("hardsigmoid", 0.0, False, None, "hardsigmoid.default"),
    ("tanh", None, False, None, "tanh.default"),
    ("silu", -0.2785, False, None, "silu.default"),
    ("hardswish", -0.375, False, None, "hardswish.default"),
    ("gelu", -0.17, False, None, "gelu.default"),
    ("mish", -0.3089, False, None, "mish.default"),
    ("softplus", 0.0, False, None, "softplus.default"),
    ("leaky_relu", None, False, None, "leaky_relu.default"),
    ("elu", None, False, None, "elu.default"),
)
ACTIVATIONS: dict[Any, Activation] = {
    op: Activation((name,), low, same, bounds)
    for name, low, same, bounds, ops in _ACTIVATION_TABLE
    for op in _found(ops)
}

# further ops that give nothing below zero
NON_NEGATIVE: frozenset[Any] = frozenset(
    _found("softmax.int _softmax.default exp.default abs.default")
)
