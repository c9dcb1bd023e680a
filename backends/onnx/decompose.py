"""Ops that torch's exporter has no translation of, or a wrong one: rules for `run_decompositions`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from graphopt.analysis.quantized import find_quantized_activations
from graphopt.backends.decompositions import (
    comparisons,
    cumulative,
    distances,
    indexing,
    pointwise,
    pooling,
    primitives,
    products,
    reductions,
    resize,
    sampling,
    sorting,
    special,
    types,
    views,
)
from graphopt.backends.decompositions.foreign import foreign_ops
from graphopt.backends.onnx.attention import attention_of_four_axes
from graphopt.backends.onnx.own_nodes import rules
from graphopt.backends.onnx.registry import translations
from graphopt.ir.torch_private import decomposition_of_composite, decomposition_table, is_composite

__all__ = ["decompositions", "rewritten_ops"]

_aten = torch.ops.aten
Table = dict[Any, Callable[..., Any]]
_LSTM = _aten.lstm.input
_ATTENTION = _aten.scaled_dot_product_attention.default
_BICUBIC, _SIZED_BICUBIC = _aten.upsample_bicubic2d.vec, _aten.upsample_bicubic2d.default


def decompositions(gm: fx.GraphModule) -> Table:
    """The table for `run_decompositions`; ops that are not in it stay whole.

    Args:
        gm: What is to be decomposed.
    """
    table = _composites() | _lacking() | _mistranslated() | rules()
    if any(map(_is_projected, gm.graph.nodes)):
        table[_LSTM] = decomposition_of_composite(_LSTM)
    table |= foreign_ops()
    if any(map(_shrinks, gm.graph.nodes)) and find_quantized_activations(gm):
        table |= {_BICUBIC: decomposition_of_composite(_BICUBIC), _SIZED_BICUBIC: resize.bicubic}
    return table


def _is_projected(node: fx.Node) -> bool:
    """Whether a node is an LSTM whose hidden state is a projection, which the standard's is not."""
    if node.target is not _LSTM:
        return False
    hidden, cell = (each.meta["val"].shape[-1] for each in node.args[1])  # type: ignore[union-attr]
    return bool(hidden != cell)


def rewritten_ops() -> frozenset[Any]:
    """Ops that this module has rules for; some for certain arguments only."""
    return frozenset(_lacking())


def _shrinks(node: fx.Node) -> bool:
    """Whether a node is a bicubic resize to fewer elements.

    Beside integers ONNX Runtime moves channels behind it, where its kernel only grows.
    """
    if node.target not in (_BICUBIC, _SIZED_BICUBIC):
        return False
    given = node.args[0].meta["val"]  # type: ignore[union-attr]
    pairs = zip(given.shape[2:], node.meta["val"].shape[2:], strict=True)
    return any(_example(new) < _example(old) for old, new in pairs)


def _example(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


@functools.cache
def _lacking() -> Table:
    """Rules of the ops that torch's exporter has no translation of."""
    known = translations()
    table = primitives.primitives() | _RULES
    return {op: rule for op, rule in table.items() if not known.is_registered(op)}


def _mistranslated() -> Table:
    """Rules of ops whose translation is wrong, or takes some arguments only."""
    losses = (_aten.cross_entropy_loss.default, _aten.nll_loss.default, _aten.nll_loss_nd.default)
    table = {op: decomposition_of_composite(op) for op in losses} | types.joins_of_one_type(_aten)
    return table | {
        _aten.atan2.default: pointwise.atan2,
        _aten.pow.Tensor_Tensor: types.operands_of_one_type(torch.pow),
        _ATTENTION: attention_of_four_axes,
        _aten.nll_loss_forward.default: decomposition_table[_aten.nll_loss_forward.default],
        _aten.repeat_interleave.Tensor: indexing.repeated_places,
    }


@functools.cache
def _composites() -> Table:
    """Torch's own rules of composite ops without a translation.

    Torch's exporter breaks those up itself, after our rules, which would miss what they are made of.
    """
    known = translations()
    ops = [op for op in torch.export.default_decompositions() if is_composite(op)]
    return {op: decomposition_of_composite(op) for op in ops if not known.is_registered(op)}


_RULES: Table = {
    _aten.fmax.default: partial(pointwise.extremum_without_nan, largest=True),
    _aten.fmin.default: partial(pointwise.extremum_without_nan, largest=False),
    _aten.signbit.default: pointwise.signbit,
    _aten.copysign.Tensor: pointwise.copysign,
    _aten.copysign.Scalar: pointwise.copysign,
    _aten.hypot.default: pointwise.hypot,
    _aten.erfinv.default: pointwise.erfinv,
    _aten.nan_to_num.default: pointwise.nan_to_num,
    _aten.heaviside.default: special.heaviside,
    _aten.frexp.Tensor: special.frexp,
    _aten.nextafter.default: special.nextafter,
    _aten.lgamma.default: special.lgamma,
    _aten.angle.default: special.angle,
    _aten.digamma.default: special.digamma,
    _aten.polygamma.default: special.polygamma,
    _aten.erfc.default: special.erfc,
    _aten.i0.default: special.bessel_i0,
    _aten.aminmax.default: reductions.aminmax,
    _aten.cumprod.default: cumulative.cumprod,
    _aten.cummax.default: cumulative.cummax,
    _aten.cummin.default: cumulative.cummin,
    _aten.logcumsumexp.default: cumulative.logcumsumexp,
    _aten._cdist_forward.default: distances.cdist,
    _aten._pdist_forward.default: distances.pdist,
    _aten.linalg_cross.default: distances.cross,
    _aten.kthvalue.default: sorting.kthvalue,
    _aten.median.default: sorting.median,
    _aten.median.dim: sorting.median_along,
    _aten.nanmedian.default: sorting.nanmedian,
    _aten.nanmedian.dim: sorting.nanmedian_along,
    _aten.mode.default: sorting.mode,
    _aten.histc.default: sorting.histc,
    _aten.searchsorted.Tensor: sorting.searchsorted,
    _aten.searchsorted.Scalar: sorting.searchsorted,
    _aten.bucketize.Tensor: sorting.bucketize,
    _aten.bucketize.Scalar: sorting.bucketize,
    _aten.trace.default: views.trace,
    _aten.diagonal.default: views.diagonal,
    _aten.diagonal_copy.default: views.diagonal,
    _aten.diagonal_scatter.default: views.diagonal_scatter,
    _aten.as_strided.default: views.as_strided,
    _aten.as_strided_copy.default: views.as_strided,
    _aten.as_strided_scatter.default: comparisons.as_strided_scatter,
    _aten.unfold.default: views.unfold,
    _aten.unfold_copy.default: views.unfold,
    _aten.scatter_reduce.two: comparisons.scatter_reduce,
    _aten.index_add.default: indexing.index_add,
    _aten.index_reduce.default: indexing.index_reduce,
    _aten.put.default: indexing.put,
    _aten.embedding_renorm.default: comparisons.embedding_renorm,
    _aten._embedding_bag.default: comparisons.embedding_bag,
    _aten._embedding_bag_forward_only.default: comparisons.embedding_bag,
    _aten._adaptive_avg_pool3d.default: partial(pooling.adaptive_avg_pool, 3),
    _aten.adaptive_max_pool2d.default: partial(pooling.adaptive_max_pool, 2),
    _aten.adaptive_max_pool3d.default: partial(pooling.adaptive_max_pool, 3),
    _aten._upsample_nearest_exact1d.default: resize.nearest_exact,
    _aten._upsample_nearest_exact2d.default: resize.nearest_exact,
    _aten._upsample_nearest_exact3d.default: resize.nearest_exact,
    _aten._upsample_bilinear2d_aa.default: resize.bilinear_antialiased,
    _aten._upsample_bicubic2d_aa.default: resize.bicubic_antialiased,
    _aten.grid_sampler_3d.default: sampling.grid_sample,
    _aten.addbmm.default: products.addbmm,
    _aten._trilinear.default: products.trilinear,
}
