"""Which ops are rewritten before coremltools sees them: it drops, miscomputes or refuses them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import fx

from graphopt.analysis.quantized import quantized_ops
from graphopt.backends.decompositions import (
    attention,
    comparisons,
    creation,
    cumulative,
    distances,
    indexing,
    normalization,
    pointwise,
    pooling,
    products,
    ranks,
    reductions,
    resize,
    sampling,
    scalars,
    sorting,
    special,
    types,
    views,
)
from graphopt.backends.decompositions.whole import Around, plain
from graphopt.ir.torch_private import OpOverload, decomposition_of_composite, decomposition_table

__all__ = ["Rules", "composite", "legal_ops", "rules_by_use"]

Rules = dict[Any, Callable[..., Any]]
_aten = torch.ops.aten

# op → rule, for all its overloads that are no out form
_BY_OP: dict[str, Callable[..., Any]] = {
    "full_like": creation.full_like,
    "zeros_like": creation.zeros_like,
    "empty_like": creation.zeros_like,
    "ones_like": creation.ones_like,
    "new_full": creation.new_full,
    "new_zeros": creation.new_full,
    "new_empty": creation.new_full,
    "new_ones": lambda x, size, **options: creation.new_full(x, size, 1, **options),
    "meshgrid": creation.meshgrid,
    "acosh": pointwise.acosh,
    "asinh": pointwise.asinh,
    "bitwise_and": pointwise.bitwise_and,
    "bitwise_not": pointwise.bitwise_not,
    "bitwise_or": pointwise.bitwise_or,
    "bitwise_xor": pointwise.bitwise_xor,
    "addbmm": products.addbmm,
    "digamma": special.digamma,
    "erfc": special.erfc,
    "frexp": special.frexp,
    "hardtanh": pointwise.hardtanh_to_one,
    "heaviside": special.heaviside,
    "i0": special.bessel_i0,
    "lgamma": special.lgamma,
    "nextafter": special.nextafter,
    "polygamma": special.polygamma,
    "copysign": pointwise.copysign,
    "elu": pointwise.elu_with_scales,
    "erfinv": pointwise.erfinv,
    "expm1": pointwise.expm1,
    "fmax": partial(pointwise.extremum_without_nan, largest=True),
    "fmin": partial(pointwise.extremum_without_nan, largest=False),
    "fmod": pointwise.fmod,
    "hypot": pointwise.hypot,
    "isinf": pointwise.isinf,
    "log1p": pointwise.log1p,
    "logaddexp": pointwise.logaddexp,
    "nan_to_num": pointwise.nan_to_num,
    "reciprocal": pointwise.reciprocal_by_division,
    "rsub": pointwise.rsub_scaled,
    "signbit": pointwise.signbit,
    "softplus": pointwise.softplus_with_threshold,
    "trunc": pointwise.trunc,
    "add": pointwise.add_scaled,
    "sub": pointwise.sub_scaled,
    "clamp_max": lambda x, high: pointwise.clamp_by_tensors(x, None, high),
    "clamp_min": lambda x, low: pointwise.clamp_by_tensors(x, low, None),
    "aminmax": reductions.aminmax,
    "argmax": reductions.argmax_of_all,
    "argmin": reductions.argmin_of_all,
    "count_nonzero": reductions.count_nonzero,
    "linalg_vector_norm": reductions.vector_norm,
    "cummax": cumulative.cummax,
    "cummin": cumulative.cummin,
    "cumprod": cumulative.cumprod,
    "cumsum": cumulative.cumsum,
    "logcumsumexp": cumulative.logcumsumexp,
    "_logcumsumexp": cumulative.logcumsumexp,
    "index": indexing.index,
    "_unsafe_index": indexing.index,
    "index_put": indexing.index_put,
    "_unsafe_index_put": indexing.index_put,
    "index_add": indexing.index_add,
    "index_copy": indexing.index_copy,
    "index_fill": indexing.index_fill,
    "index_reduce": indexing.index_reduce,
    "index_select": indexing.index_select,
    "gather": indexing.gather_of_any_shape,
    "scatter_add": indexing.scatter_add_of_any_shape,
    "masked_scatter": indexing.masked_scatter,
    "put": indexing.put,
    "take": indexing.take,
    "as_strided": views.as_strided,
    "as_strided_copy": views.as_strided,
    "constant_pad_nd": views.pad_or_cut,
    "diag_embed": views.diag_embed,
    "diagonal": views.diagonal,
    "diagonal_copy": views.diagonal,
    "diagonal_scatter": views.diagonal_scatter,
    "permute": ranks.permute_in_few_axes,
    "permute_copy": ranks.permute_in_few_axes,
    "transpose": ranks.same_scalar,
    "transpose_copy": ranks.same_scalar,
    "squeeze": ranks.same_scalar,
    "squeeze_copy": ranks.same_scalar,
    "t": ranks.transposed_matrix,
    "t_copy": lambda x: x.clone() if x.dim() < 2 else x.transpose(0, 1),
    "expand": ranks.same_without_sizes,
    "expand_copy": ranks.same_without_sizes,
    "repeat": ranks.same_without_sizes,
    "tile": ranks.same_without_sizes,
    "logsumexp": ranks.same_scalar,
    "angle": special.angle,
    "as_strided_scatter": comparisons.as_strided_scatter,
    "embedding_renorm": comparisons.embedding_renorm,
    "_embedding_bag": comparisons.embedding_bag,
    "_embedding_bag_forward_only": comparisons.embedding_bag,
    "_trilinear": products.trilinear,
    "matmul": ranks.matmul_of_vectors,
    "pad": views.pad_in_turn,
    "roll": views.roll,
    "select_scatter": views.select_scatter,
    "trace": views.trace,
    "unfold": views.unfold,
    "unfold_copy": views.unfold,
    "argsort": sorting.argsort,
    "bucketize": sorting.bucketize,
    "histc": sorting.histc,
    "kthvalue": sorting.kthvalue,
    "mode": sorting.mode,
    "searchsorted": sorting.searchsorted,
    "sort": sorting.sort,
    "topk": sorting.topk_of_scalar,
    "_cdist_forward": distances.cdist,
    "_pdist_forward": distances.pdist,
    "linalg_cross": distances.cross,
    "upsample_nearest1d": resize.nearest,
    "upsample_nearest2d": resize.nearest,
    "upsample_nearest3d": resize.nearest,
    "_upsample_nearest_exact1d": resize.nearest_exact,
    "_upsample_nearest_exact2d": resize.nearest_exact,
    "_upsample_nearest_exact3d": resize.nearest_exact,
    "upsample_linear1d": resize.linear,
    "upsample_bilinear2d": resize.bilinear,
    "upsample_trilinear3d": resize.trilinear,
    "upsample_bicubic2d": resize.bicubic,
    "_upsample_bilinear2d_aa": resize.bilinear_antialiased,
    "_upsample_bicubic2d_aa": resize.bicubic_antialiased,
    "avg_pool1d": partial(pooling.avg_pool, 1),
    "avg_pool2d": partial(pooling.avg_pool, 2),
    "avg_pool3d": partial(pooling.avg_pool, 3),
    "max_unpool2d": partial(pooling.max_unpool, 2),
    "max_unpool3d": partial(pooling.max_unpool, 3),
    "adaptive_avg_pool1d": partial(pooling.adaptive_avg_pool, 1),
    "adaptive_avg_pool2d": partial(pooling.adaptive_avg_pool, 2),
    "_adaptive_avg_pool2d": partial(pooling.adaptive_avg_pool, 2),
    "adaptive_avg_pool3d": partial(pooling.adaptive_avg_pool, 3),
    "_adaptive_avg_pool3d": partial(pooling.adaptive_avg_pool, 3),
    "adaptive_max_pool1d": partial(pooling.adaptive_max_pool, 1),
    "adaptive_max_pool2d": partial(pooling.adaptive_max_pool, 2),
    "adaptive_max_pool3d": partial(pooling.adaptive_max_pool, 3),
    "group_norm": normalization.group_norm,
    "instance_norm": normalization.instance_norm,
    "scaled_dot_product_attention": attention.attention_of_equal_heads,
}
_BY_OVERLOAD: Rules = {
    torch.ops.prims.view_of.default: torch.clone,
    _aten.alias.default: torch.clone,
    _aten.full.default: creation.full_without_axes,
    _aten.embedding.default: indexing.embedding_of_scalar,
    _aten.zeros.default: creation.zeros,
    _aten.ones.default: creation.ones,
    _aten.empty.memory_format: creation.zeros,
    _aten.arange.default: creation.arange,
    _aten.arange.start: creation.arange,
    _aten.arange.start_step: creation.arange,
    _aten.round.decimals: pointwise.round_to_decimals,
    _aten.polar.default: creation.polar,
    _aten.remainder.Scalar_Tensor: partial(pointwise.number_first, torch.remainder),
    _aten.xlogy.Scalar_Self: partial(pointwise.number_first, torch.xlogy),
    _aten.bitwise_left_shift.Scalar_Tensor: partial(
        pointwise.number_first, torch.bitwise_left_shift
    ),
    _aten.bitwise_right_shift.Scalar_Tensor: partial(
        pointwise.number_first, torch.bitwise_right_shift
    ),
    _aten.where.Scalar: pointwise.where_with_numbers,
    _aten.where.ScalarSelf: pointwise.where_with_numbers,
    _aten.where.ScalarOther: pointwise.where_with_numbers,
    _aten.atan2.default: pointwise.atan2,
    _aten.clamp.default: pointwise.clamp_ordered,
    _aten.clamp.Tensor: pointwise.clamp_by_tensors,
    _aten.mean.default: lambda x, *, dtype=None: reductions.mean(x, dtype=dtype),
    _aten.mean.dim: reductions.mean,
    _aten.sum.default: lambda x, *, dtype=None: reductions.sum_of_type(x, dtype=dtype),
    _aten.sum.dim_IntList: reductions.sum_of_type,
    _aten.any.default: reductions.any_true,
    _aten.any.dim: reductions.any_true,
    _aten.any.dims: reductions.any_true,
    _aten.all.default: reductions.all_true,
    _aten.all.dim: reductions.all_true,
    _aten.all.dims: reductions.all_true,
    _aten.var.correction: reductions.var,
    _aten.std.correction: reductions.std,
    _aten.var_mean.correction: reductions.var_mean,
    _aten.std_mean.correction: reductions.std_mean,
    _aten.median.default: sorting.median,
    _aten.median.dim: sorting.median_along,
    _aten.nanmedian.default: sorting.nanmedian,
    _aten.nanmedian.dim: sorting.nanmedian_along,
    _aten.grid_sampler.default: lambda *args: _grid_sample(*args),
    _aten.grid_sampler_2d.default: sampling.grid_sample,
    _aten.grid_sampler_3d.default: sampling.grid_sample,
    _aten.scatter.src: indexing.scatter_of_any_shape,
    _aten.scatter.value: indexing.scatter_value,
    _aten.scatter.reduce: indexing.scatter_combined,
    _aten.scatter.value_reduce: indexing.scatter_combined,
    _aten.scatter_reduce.two: indexing.scatter_reduce,
    _aten.repeat_interleave.self_Tensor: indexing.repeat_interleave,
}


def _grid_sample(x: Any, grid: Any, mode: int, padding: int, aligned: bool) -> Any:
    if x.dim() == 4 and mode != 2 and padding != 2:
        return NotImplemented
    return sampling.grid_sample(x, grid, mode, padding, aligned)


# torch's own, for what is registered with less than torch has
_TORCHS = (
    *("mse_loss", "nll_loss", "nll_loss_forward", "nll_loss2d_forward", "huber_loss"),
    *("smooth_l1_loss", "addmv", "addr", "renorm", "lerp", "log_sigmoid_forward"),
    *("im2col", "col2im", "nll_loss_nd", "cosine_similarity", "norm", "frobenius_norm"),
    *("cross", "triu", "tril", "broadcast_tensors", "affine_grid_generator"),
)


def legal_ops() -> Rules:
    """Rules for every op that torch or we can write in others and coremltools has not right."""
    return dict(_all_rules())


@cache
def _all_rules() -> Rules:
    rules: Rules = {}
    for name in _TORCHS:
        rules |= {op: composite(op) or decomposition_table.get(op) for op in _overloads(name)}
    for name, rule in _BY_OP.items():
        rules |= dict.fromkeys(_overloads(name), rule)
    rules |= (
        _BY_OVERLOAD
        | types.joins_of_one_type(_aten, ["stack", "hstack"])
        | _unbatched()
        | _by_scale_factors()
        | _quantized_forms()
    )
    return rules | _of_scalars(rules)


def _of_scalars(rules: Rules) -> Rules:
    """Reductions of tensors without axes, beside the rules for others."""
    forms = {str(op).removeprefix("aten."): plain(rule) for op, rule in rules.items()}
    return {op: Around(op, rule) for op, rule in scalars.reductions(_aten, forms).items()}


def _unbatched() -> Rules:
    pools = {op: pooling.MaxPool(op, n) for n in (1, 2, 3) for op in _overloads(f"max_pool{n}d")}
    return pools | {
        overload: ranks.Unbatched(overload, n)
        for n in (1, 2, 3)
        for name in (f"conv{n}d", f"conv_transpose{n}d")
        for overload in _overloads(name)
    }


def _by_scale_factors() -> Rules:
    """Rules for resizes by factors, which are rewritten as those by sizes."""
    return {
        packet.vec: ranks.by_scale_factors(
            packet.default, rule, _spatial_axes(name), corners="nearest" not in name
        )
        for name, rule in _BY_OP.items()
        if "upsample" in name and hasattr(packet := getattr(_aten, name), "vec")
    }


def _spatial_axes(name: str) -> int:
    return next(n for n in (1, 2, 3) if f"{n}d" in name)


def _overloads(name: str) -> list[Any]:
    packet = getattr(_aten, name)
    names = [name for name in packet.overloads() if "out" not in name and name != "vec"]
    found = []
    for overload in names:
        try:
            found.append(getattr(packet, overload))
        except (AttributeError, RuntimeError):
            continue
    return [op for op in found if any("Tensor" in str(arg.type) for arg in op._schema.arguments)]


def composite(op: Any) -> Callable[..., Any] | None:
    """Torch's own rule for a composite op, None for another."""
    if not isinstance(op, OpOverload) or not op._can_decompose():
        return None
    # `op.decompose` would come back to the table that it is put into
    rule: Callable[..., Any] = decomposition_of_composite(op)
    return rule


def rules_by_use(graph: fx.Graph) -> Rules:
    """Rules by use: of pooling whose indices are read or windows have gaps, norms whose moments are."""
    rules: Rules = {}
    for n in (1, 2, 3):
        op = getattr(_aten, f"max_pool{n}d_with_indices").default
        uses = [
            user for node in graph.find_nodes(op="call_function", target=op) for user in node.users
        ]
        rule = partial(pooling.max_pool_with_indices, n)
        always = any(user.target is operator.getitem and user.args[1] == 1 for user in uses)
        rules[op] = rule if always else pooling.MaxPool(op, n, places=True)
    return rules | _norm_rules(graph)


def _norm_rules(graph: fx.Graph) -> Rules:
    """Torch's rules for norms whose moments are read."""
    rules: Rules = {}
    for op in (_aten.native_layer_norm.default, _aten.native_group_norm.default):
        nodes = graph.find_nodes(op="call_function", target=op)
        reads = [user.args[1] for node in nodes for user in node.users if user.users]
        if any(place != 0 for place in reads):
            rules[op] = decomposition_table[op]
    return rules


def _quantized_forms() -> Rules:
    """Rules that round float16 by way of float32, as Core ML wants scales of the input's type.

    What has more axes than Core ML has is rounded in fewer; the reshapes around it fall together
    with the views that made the axes.
    """
    quantize = quantized_ops().quantize_per_tensor.default
    dequantize = quantized_ops().dequantize_per_tensor.default

    def rounded(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        if x.dim() > ranks.MOST_AXES:
            return rounded_whole(ranks.in_few_axes(x), *args, **options).reshape(x.shape)
        return quantize(x.float(), *args, **options) if x.dtype is torch.float16 else NotImplemented

    def rounded_whole(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        return quantize(x.float() if x.dtype is torch.float16 else x, *args, **options)

    def restored(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        if x.dim() > ranks.MOST_AXES:
            return restored_whole(ranks.in_few_axes(x), *args, **options).reshape(x.shape)
        half = options.get("out_dtype") is torch.float16
        return restored_whole(x, *args, **options) if half else NotImplemented

    def restored_whole(x: torch.Tensor, *args: Any, out_dtype: Any = None) -> Any:
        return dequantize(x, *args).to(torch.float32 if out_dtype is None else out_dtype)

    return {quantize: rounded, dequantize: restored}
