"""Ops with weights: convolutions, products, lookups and recurrent layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from graphopt.ir.op_info.model import (
    BiasSlot,
    ConvolutionArguments,
    MatrixKind,
    OpInfo,
    Scales,
    WeightSlot,
)
from graphopt.ir.op_info.overloads import aten

__all__ = ["WEIGHT_OPS"]


def _convolution(
    ndim: int, names: tuple[str, ...], targets: tuple[Any, ...], places: ConvolutionArguments
) -> OpInfo:
    turned = places.transposed
    kind: MatrixKind = "transposed" if turned else "conv"
    return OpInfo(
        names,
        targets,
        weights=(WeightSlot(1, 1 if turned else 0, kind, 0, 2, 1),),
        biases=(BiasSlot(2),),
        convolution=replace(places, ndim=ndim),
        folds_norm=True,
        scales=Scales.COMPUTE,
        fresh=True,
    )


_PLAIN = ConvolutionArguments(3, 4, 5, 6)
_TRANSPOSED = ConvolutionArguments(3, 4, 7, 6, transposed=True)
_GENERAL = ConvolutionArguments(3, 4, 5, 8)
_SWITCH = 6  # argument of `convolution` that makes it a transposed one


def _variants() -> dict[tuple[bool, int], OpInfo]:
    targets = aten("convolution")
    return {
        (turned, ndim): _convolution(
            ndim,
            (f"conv_transpose{ndim}d" if turned else f"conv{ndim}d", "convolution"),
            targets,
            replace(_GENERAL, transposed=turned),
        )
        for turned in (False, True)
        for ndim in (1, 2, 3)
    }


_VARIANTS = _variants()


def _which_convolution(node: fx.Node) -> OpInfo:
    weight = node.args[1]
    value = weight.meta.get("val") if isinstance(weight, fx.Node) else None
    ndim = value.ndim - 2 if isinstance(value, Tensor) else 2
    return _VARIANTS[bool(node.args[_SWITCH]), ndim]


_LEFT = WeightSlot(0, -2, "left", data=1, result_axis=-2)
_RIGHT = WeightSlot(1, -1, "right", data=0)
_PRODUCT = OpInfo(
    ("matmul",),
    aten("matmul"),
    weights=(_LEFT, _RIGHT),
    scales=Scales.COMPUTE,
    data=(0, 1),
    attention="product",
)
# a stack of matrices is none
_BATCHED = (replace(_LEFT, matrix=None), replace(_RIGHT, matrix=None))

WEIGHT_OPS: tuple[OpInfo, ...] = (
    replace(_convolution(1, ("conv1d",), aten("conv1d"), _PLAIN), kept_whole=True),
    _convolution(1, ("conv1d",), aten("conv1d.padding"), _PLAIN),
    replace(_convolution(2, ("conv2d",), aten("conv2d conv2d.padding"), _PLAIN), kept_whole=True),
    replace(_convolution(3, ("conv3d",), aten("conv3d"), _PLAIN), kept_whole=True),
    _convolution(3, ("conv3d",), aten("conv3d.padding"), _PLAIN),
    replace(
        _convolution(1, ("conv_transpose1d",), aten("conv_transpose1d"), _TRANSPOSED),
        kept_whole=True,
    ),
    replace(
        _convolution(2, ("conv_transpose2d",), aten("conv_transpose2d.input"), _TRANSPOSED),
        kept_whole=True,
    ),
    _convolution(3, ("conv_transpose3d",), aten("conv_transpose3d.input"), _TRANSPOSED),
    replace(_VARIANTS[False, 2], names=("convolution",), by_node=_which_convolution),
    OpInfo(
        ("linear",),
        aten("linear"),
        weights=(WeightSlot(1, 0, "linear", 0, 2),),
        biases=(BiasSlot(2),),
        scales=Scales.COMPUTE,
        fresh=True,
        kept_whole=True,
    ),
    # its table has scales of its own already, and no target computes with the rows
    OpInfo(
        ("embedding",),
        aten("embedding"),
        weights=(WeightSlot(0, 0, "embedding", data=1),),
        scales=Scales.COMPUTE,
        data=(),
        quantizes_output=False,
        kept_whole=True,
    ),
    OpInfo(
        ("embedding_bag",),
        aten("embedding_bag.padding_idx embedding_bag"),
        weights=(WeightSlot(0, 0),),
        data=(),
        quantizes_output=False,
    ),
    _PRODUCT,
    replace(_PRODUCT, targets=aten("mm"), linear_if_turned=True),
    replace(_PRODUCT, targets=aten("bmm"), weights=_BATCHED),
    OpInfo(
        ("addmm",),
        aten("addmm"),
        weights=(
            WeightSlot(1, -2, "left", data=2, result_axis=-2),
            WeightSlot(2, -1, "right", data=1, bias=0),
        ),
        biases=(BiasSlot(0, -1),),
        scales=Scales.COMPUTE,
        data=(1, 2),
        linear_if_turned=True,
    ),
    OpInfo(
        ("baddbmm",),
        aten("baddbmm"),
        weights=(WeightSlot(1, -2, data=2, result_axis=-2), WeightSlot(2, -1, data=1)),
        scales=Scales.COMPUTE,
        data=(1, 2),
        attention="product",
    ),
    OpInfo(("einsum",), aten("einsum"), composite=True),
    OpInfo(
        ("recurrent_cell",),
        aten("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"),
        composite=True,
    ),
    OpInfo(("tensordot",), aten("tensordot"), composite=True),
    *(
        OpInfo((name,), aten(f"{name}.input"), weight_list=2, inner_rate=5, training=6)
        for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    ),
)
