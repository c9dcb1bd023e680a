"""Which ops are decomposed before conversion, and how."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from graphopt.backends.coreai.rules import forms, numbers, places, windows
from graphopt.backends.coreai.rules.attention import attention
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
    scalars,
    sorting,
    special,
    types,
    views,
)
from graphopt.backends.decompositions.foreign import foreign_ops
from graphopt.backends.decompositions.whole import Around, plain
from graphopt.backends.quiet import quiet
from graphopt.extras import require
from graphopt.ir import op_info
from graphopt.ir.torch_private import decomposition_table

__all__ = ["RUNNING_SUMS", "converted_ops", "decompositions", "rewritten_ops"]

_aten = torch.ops.aten
Table = dict[Any, Callable[..., Any]]


@functools.cache
def converted_ops() -> frozenset[str]:
    """Ops of aten that coreai-torch has a translation of, as "add.Tensor"."""
    with quiet("coreai_torch"):
        require("coreai_torch", "coreai")
        from coreai_torch._aten_to_core import _aten_to_core_resolver, _higher_order_resolver
    return frozenset(_aten_to_core_resolver) | frozenset(_higher_order_resolver)


def decompositions() -> Table:
    """The table for `run_decompositions`: ops that coreai-torch takes and gets right stay whole."""
    with quiet("coreai_torch"):
        coreai_torch = require("coreai_torch", "coreai")
    table: Table = dict(coreai_torch.get_decomp_table())
    converted = converted_ops()
    for op, rule in decomposition_table.items():
        name = str(op)
        if name.startswith("aten.") and name.removeprefix("aten.") not in converted:
            table.setdefault(op, rule)
    table |= primitives.primitives(primitives.with_tensors) | foreign_ops()
    return table | _LACKING | _rules(_MISCOMPUTED)


def rewritten_ops() -> frozenset[Any]:
    """Ops that this module has rules for, beside torch's own; some for certain arguments only."""
    return frozenset(_LACKING) | frozenset(_MISCOMPUTED)


def _rules(wanted: Table) -> Table:
    return {op: Around(op, rule) for op, rule in wanted.items()}


# sums that only grow: in float16 they would stand still at 2048
RUNNING_SUMS = (_aten.cumsum.default,)
# what coreai-torch has no translation of
_LACKING: Table = {
    _aten.repeat_interleave.Tensor: indexing.repeated_places,
    _aten.isnan.default: numbers.isnan,
    _aten.isposinf.default: lambda x: torch.eq(x, torch.inf),
    _aten.fmax.default: partial(pointwise.extremum_without_nan, largest=True),
    _aten.fmin.default: partial(pointwise.extremum_without_nan, largest=False),
    _aten.signbit.default: pointwise.signbit,
    _aten.copysign.Tensor: pointwise.copysign,
    _aten.copysign.Scalar: pointwise.copysign,
    _aten.hypot.default: pointwise.hypot,
    _aten.erfinv.default: pointwise.erfinv,
    _aten.nan_to_num.default: pointwise.nan_to_num,
    _aten.hardshrink.default: forms.hardshrink,
    _aten.hardtanh.default: pointwise.hardtanh_to_one,
    _aten.clamp.default: pointwise.clamp_in_result_type,
    _aten.empty_permuted.default: forms.empty_permuted,
    _aten.heaviside.default: special.heaviside,
    _aten.frexp.Tensor: special.frexp,
    _aten.nextafter.default: special.nextafter,
    _aten.lgamma.default: special.lgamma,
    _aten.angle.default: special.angle,
    _aten.digamma.default: special.digamma,
    _aten.polygamma.default: special.polygamma,
    _aten.erfc.default: special.erfc,
    _aten.i0.default: special.bessel_i0,
    _aten.var.correction: reductions.var,
    _aten.std.correction: reductions.std,
    _aten.var_mean.correction: reductions.var_mean,
    _aten.std_mean.correction: reductions.std_mean,
    _aten.aminmax.default: reductions.aminmax,
    _aten.cumprod.default: cumulative.cumprod,
    _aten.cummax.default: cumulative.cummax,
    _aten.cummin.default: cumulative.cummin,
    _aten.logcumsumexp.default: cumulative.logcumsumexp,
    _aten._cdist_forward.default: distances.cdist,
    _aten._pdist_forward.default: distances.pdist,
    _aten.linalg_cross.default: distances.cross,
    _aten.sort.default: sorting.sort,
    _aten.sort.stable: lambda x, *, stable=None, dim=-1, descending=False: sorting.sort(
        x, dim, descending
    ),
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
    _aten.isin.Tensor_Tensor: numbers.isin,
    _aten.trace.default: views.trace,
    _aten.diagonal.default: views.diagonal,
    _aten.diagonal_copy.default: views.diagonal,
    _aten.diagonal_scatter.default: views.diagonal_scatter,
    _aten.as_strided.default: views.as_strided,
    _aten.as_strided_copy.default: views.as_strided,
    _aten.as_strided_scatter.default: comparisons.as_strided_scatter,
    _aten.unfold.default: views.unfold,
    _aten.unfold_copy.default: views.unfold,
    _aten.scatter_add.default: places.scatter_add,
    _aten.scatter_reduce.two: comparisons.scatter_reduce,
    _aten.index_add.default: indexing.index_add,
    _aten.index_reduce.default: indexing.index_reduce,
    _aten.put.default: indexing.put,
    _aten.embedding_renorm.default: comparisons.embedding_renorm,
    _aten._embedding_bag.default: comparisons.embedding_bag,
    _aten._embedding_bag_forward_only.default: comparisons.embedding_bag,
    _aten.max_pool3d_with_indices.default: windows.max_pool3d,
    _aten._adaptive_avg_pool3d.default: partial(pooling.adaptive_avg_pool, 3),
    _aten.adaptive_max_pool2d.default: partial(pooling.adaptive_max_pool, 2),
    _aten.adaptive_max_pool3d.default: partial(pooling.adaptive_max_pool, 3),
    _aten.upsample_nearest1d.default: resize.nearest,
    _aten.upsample_nearest3d.default: resize.nearest,
    _aten._upsample_nearest_exact1d.default: resize.nearest_exact,
    _aten._upsample_nearest_exact2d.default: resize.nearest_exact,
    _aten._upsample_nearest_exact3d.default: resize.nearest_exact,
    _aten.upsample_linear1d.default: resize.linear,
    _aten.upsample_linear1d.vec: windows.by_factors(resize.linear, 1),
    _aten.upsample_trilinear3d.default: resize.trilinear,
    _aten.upsample_trilinear3d.vec: windows.by_factors(resize.trilinear, 3),
    _aten.upsample_bicubic2d.default: resize.bicubic,
    _aten.upsample_bicubic2d.vec: windows.by_factors(resize.bicubic, 2),
    _aten._upsample_bilinear2d_aa.default: resize.bilinear_antialiased,
    _aten._upsample_bicubic2d_aa.default: resize.bicubic_antialiased,
    _aten.grid_sampler_2d.default: sampling.grid_sample,
    _aten.grid_sampler_3d.default: sampling.grid_sample,
    _aten.addbmm.default: products.addbmm,
    _aten._trilinear.default: products.trilinear,
}
_AS_NUMBERS = (
    *("amax.default", "amin.default", "max.default", "min.default"),
    *("max.dim", "min.dim", "topk.default", "argmax.default"),
)
_REDUCTIONS: Table = {
    **scalars.reductions(
        _aten,
        {
            **dict.fromkeys(_AS_NUMBERS, forms.as_numbers),
            "argmin.default": plain(numbers.argmin),
        },
    ),
    _aten.linalg_vector_norm.default: plain(reductions.vector_norm),
    **dict.fromkeys(
        (_aten.maximum.default, _aten.minimum.default, _aten.gt.Tensor, _aten.lt.Tensor),
        forms.as_numbers,
    ),
}
# what it drops, miscomputes or refuses for some arguments
_MISCOMPUTED: Table = {
    # a number beside no float is taken as float16
    _aten.scalar_tensor.default: plain(numbers.scalar_tensor),
    _aten.add.Tensor: plain(numbers.logical_sum),
    _aten.add.Scalar: plain(numbers.scaled_add),
    _aten.sub.Tensor: plain(numbers.scaled_sub),
    _aten.sub.Scalar: plain(numbers.scaled_sub),
    _aten.mul.Tensor: plain(numbers.logical_product),
    _aten.bitwise_and.Tensor: plain(numbers.of_booleans(torch.logical_and)),
    _aten.bitwise_or.Tensor: plain(numbers.of_booleans(torch.logical_or)),
    _aten.bitwise_xor.Tensor: plain(numbers.of_booleans(torch.logical_xor)),
    _aten.ge.Tensor: plain(numbers.without_equality(torch.gt)),
    _aten.ge.Scalar: plain(numbers.without_equality(torch.gt)),
    _aten.le.Tensor: plain(numbers.without_equality(torch.lt)),
    _aten.le.Scalar: plain(numbers.without_equality(torch.lt)),
    _aten.bitwise_not.default: plain(numbers.bitwise_not),
    _aten.log1p.default: plain(pointwise.log1p),
    _aten.expm1.default: plain(pointwise.expm1),
    _aten.floor.default: plain(forms.floor),
    _aten.ceil.default: plain(forms.ceil),
    _aten.trunc.default: plain(forms.trunc),
    _aten.div.Tensor_mode: plain(forms.divide_rounded),
    _aten.view.default: plain(forms.zero_dim_view),
    _aten.squeeze.dims: forms.squeeze,
    **{
        getattr(_aten, f"{kind}_pad{n}d").default: plain(partial(views.pad_in_turn, mode=mode))
        for kind, mode in (("reflection", "reflect"), ("replication", "replicate"))
        for n in (1, 2, 3)
    },
    _aten.gather.default: plain(indexing.gather_of_any_shape),
    _aten.scatter.src: plain(places.scatter),
    _aten.scatter.value: plain(places.scatter_value),
    _aten.scatter.reduce: plain(places.scatter_onto),
    _aten.scatter.value_reduce: plain(places.scatter_value),
    _aten.index_put.default: places.index_put,
    _aten.cumsum.default: plain(cumulative.cumsum),
    _aten.avg_pool2d.default: windows.avg_pool(2),
    _aten.avg_pool3d.default: windows.avg_pool(3),
    _aten.max_pool2d_with_indices.default: windows.max_pool2d,
    _aten._adaptive_avg_pool2d.default: plain(windows.adaptive_avg_pool2d),
    _aten.upsample_nearest2d.vec: plain(windows.nearest2d),
    _aten.upsample_bilinear2d.vec: plain(windows.bilinear2d),
    _aten.convolution.default: plain(products.conv_transpose),
    _aten.scaled_dot_product_attention.default: attention,
    op_info.BATCH_NORM: forms.batch_norm,
    _aten.native_layer_norm.default: forms.layer_norm,
    _aten.native_group_norm.default: forms.group_norm,
    _aten.expand.default: plain(forms.expand),
    _aten.masked_scatter.default: plain(forms.masked_scatter),
    _aten.atan2.default: plain(types.operands_of_one_type(torch.atan2, floats=True)),
    **_REDUCTIONS,
}
