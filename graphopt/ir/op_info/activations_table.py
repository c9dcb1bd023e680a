"""Elementwise functions, arithmetic, pooling and attention."""

from __future__ import annotations

from graphopt.ir.op_info.model import Activation, OpInfo, Scales
from graphopt.ir.op_info.overloads import aten

__all__ = ["ACTIVATION_OPS", "ARITHMETIC_OPS", "LEAKY_RELU"]

LEAKY_RELU = aten("leaky_relu")[0]

ACTIVATION_OPS: tuple[OpInfo, ...] = (
    OpInfo(
        ("relu",),
        aten("relu"),
        activation=Activation(0.0, homogeneous=True),
        scales=Scales.PASS,
        fresh=True,
        in_place=aten("relu_")[0],
        kept_whole=True,
    ),
    OpInfo(
        ("relu6",), aten("relu6"), activation=Activation(0.0), scales=Scales.PASS, kept_whole=True
    ),
    OpInfo(
        ("hardtanh",),
        aten("hardtanh"),
        activation=Activation(bounds_from=1),
        scales=Scales.FLOAT,
        kept_whole=True,
    ),
    OpInfo(
        ("clamp",),
        aten("clamp clamp_min"),
        activation=Activation(bounds_from=1),
        scales=Scales.PASS,
    ),
    *(
        OpInfo(
            (name,),
            aten(name),
            activation=Activation(low, homogeneous=name == "leaky_relu"),
            scales=Scales.FLOAT,
            kept_whole=whole,
        )
        for name, low, whole in (
            ("sigmoid", 0.0, True),
            ("hardsigmoid", 0.0, True),
            ("tanh", None, True),
            ("silu", -0.2785, True),
            ("hardswish", -0.375, True),
            ("gelu", -0.17, True),
            ("mish", -0.3089, False),
            ("softplus", 0.0, False),
            ("leaky_relu", None, True),
            ("elu", None, False),
        )
    ),
    OpInfo(("exp",), aten("exp"), non_negative=True),
    OpInfo(("abs",), aten("abs"), non_negative=True),
)

ARITHMETIC_OPS: tuple[OpInfo, ...] = (
    # operands keep scales of their own: that is more precise, and no target needs them equal
    OpInfo(
        ("add",),
        aten("add.Tensor"),
        scales=Scales.COMPUTE,
        data=(0, 1),
        both_data=True,
        arithmetic=True,
        attention="between",
        sums=True,
        fresh=True,
        in_place=aten("add_.Tensor")[0],
        kept_whole=True,
    ),
    OpInfo(("add",), aten("add_.Tensor"), sums=True),
    OpInfo(
        ("sub",),
        aten("sub.Tensor"),
        scales=Scales.COMPUTE,
        data=(0, 1),
        both_data=True,
        arithmetic=True,
        attention="between",
        kept_whole=True,
    ),
    OpInfo(
        ("mul",),
        aten("mul.Tensor"),
        scales=Scales.COMPUTE,
        data=(0, 1),
        both_data=True,
        arithmetic=True,
        attention="between",
        fresh=True,
        kept_whole=True,
    ),
    OpInfo(("div",), aten("div.Tensor"), scales=Scales.FLOAT, arithmetic=True, attention="between"),
    OpInfo(("pow",), aten("pow.Tensor_Scalar"), scales=Scales.FLOAT, arithmetic=True),
    OpInfo(("add",), aten("add.Scalar"), attention="between"),
    OpInfo(("mul",), aten("mul.Scalar"), attention="between"),
    OpInfo(("div",), aten("div.Scalar"), attention="between"),
    OpInfo(("masked_fill",), aten("masked_fill.Scalar"), attention="between"),
    OpInfo(("where",), aten("where.self"), attention="between"),
    # averages fall between the values of their operand, so they get a scale of their own
    OpInfo(
        ("avg_pool",),
        aten("avg_pool1d avg_pool3d"),
        scales=Scales.COMPUTE,
        averages=True,
    ),
    OpInfo(
        ("avg_pool",),
        aten("avg_pool2d"),
        scales=Scales.COMPUTE,
        averages=True,
        kept_whole=True,
    ),
    OpInfo(
        ("adaptive_avg_pool",),
        aten("adaptive_avg_pool1d adaptive_avg_pool3d"),
        scales=Scales.COMPUTE,
        averages=True,
    ),
    OpInfo(
        ("adaptive_avg_pool",),
        aten("adaptive_avg_pool2d"),
        scales=Scales.COMPUTE,
        averages=True,
        kept_whole=True,
    ),
    OpInfo(
        ("mean",),
        aten("mean.dim"),
        scales=Scales.COMPUTE,
        averages=True,
        pools_over=1,
        arithmetic=True,
        kept_whole=True,
    ),
    OpInfo(
        ("upsample",),
        aten(
            "upsample_bilinear2d upsample_bilinear2d.vec upsample_bicubic2d upsample_bicubic2d.vec"
        ),
        scales=Scales.COMPUTE,
    ),
    OpInfo(("cat",), aten("cat"), scales=Scales.SHARE, kept_whole=True),
    OpInfo(
        ("cat",),
        aten("concat concatenate hstack vstack row_stack dstack column_stack"),
        scales=Scales.SHARE,
    ),
    OpInfo(("stack",), aten("stack"), scales=Scales.SHARE),
    OpInfo(
        ("maximum",),
        aten("maximum"),
        scales=Scales.SHARE,
        data=(0, 1),
        both_data=True,
        attention="between",
    ),
    OpInfo(("minimum",), aten("minimum"), scales=Scales.SHARE, data=(0, 1), both_data=True),
    OpInfo(
        ("scaled_dot_product_attention",),
        aten("scaled_dot_product_attention"),
        scales=Scales.COMPUTE,
        data=(0, 1, 2),
        attention="whole",
        inner_rate=4,
    ),
    OpInfo(
        ("softmax",),
        aten("softmax.int"),
        scales=Scales.FLOAT,
        non_negative=True,
        attention="softmax",
        kept_whole=True,
    ),
    OpInfo(
        ("softmax",),
        aten("_softmax"),
        scales=Scales.FLOAT,
        non_negative=True,
        attention="softmax",
    ),
)
