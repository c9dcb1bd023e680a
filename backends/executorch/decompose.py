"""Which ops are decomposed before conversion: what neither XNNPACK nor a portable kernel computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.decompositions import (
    comparisons,
    cumulative,
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
from graphopt.backends.executorch import exact_ops
from graphopt.ir.torch_private import OpOverload, decomposition_table

__all__ = ["decompositions", "rewritten_ops"]

_aten = torch.ops.aten
_prims: Any = torch.ops.prims
Rule = Callable[..., Any]
Table = dict[Any, Rule]


def decompositions(kept: Iterable[Any]) -> Table:
    """The table for `run_decompositions`.

    Args:
        kept: Ops that a partitioner takes whole.
    """
    table = dict(_all())
    for op in kept:
        table.pop(op, None)
    table.update({op: Around(op, rule) for op, rule in _MISCOMPUTED.items()})
    return table | foreign_ops()


def rewritten_ops() -> frozenset[Any]:
    """Ops that this module has rules for, beside torch's own; some for certain arguments only."""
    return frozenset(_LACKING) | frozenset(_MISCOMPUTED)


@functools.cache
def _all() -> Table:
    """ExecuTorch's own decompositions, and one for each op that would be left without a kernel."""
    known = _kernels()
    table: Table = {
        op: rule
        for op, rule in torch.export.default_decompositions().items()
        if op.namespace == "aten"
    }
    for op, rule in decomposition_table.items():
        if op not in _LEAVE and _is_functional(op) and not _has_kernel(op, known):
            table.setdefault(op, rule)
    table.update(primitives.primitives(others={"exp2": exact_ops.exp2, "var": _variance}))
    table.update({op: rule for op, rule in _LACKING.items() if not _has_kernel(op, known)})
    return table


def _kernels() -> frozenset[str]:
    """Names of the ops that the runtime has kernels of, with their overloads."""
    from executorch.runtime import Runtime

    return frozenset(Runtime.get().operator_registry.operator_names)


def _is_functional(op: Any) -> bool:
    return isinstance(op, OpOverload) and not op._schema.is_mutable


def _has_kernel(op: Any, known: frozenset[str]) -> bool:
    name = str(op._schema.name)
    if f"{name}.{op._schema.overload_name}_out" in known:
        return True
    if any(each.startswith(f"{name}_copy.") for each in known):
        return True
    from executorch.exir.operator.convert import to_out_variant

    try:
        out, _ = to_out_variant(op)
    except (RuntimeError, AssertionError, AttributeError):
        return False
    overload = out._schema.overload_name
    return (f"{name}.{overload}" if overload else name) in known


def _variance(x: Tensor, dims: list[int], correction: float = 1, **_: Any) -> Tensor:
    return torch.var(x, dims, correction=correction)


def _empty(size: list[int], physical_layout: list[int], **options: Any) -> Tensor:
    del physical_layout
    return torch.zeros([int(length) for length in size], dtype=options.get("dtype"))


def _average_volume(x: Tensor, size: list[int]) -> Any:
    whole = all(length == 1 for length in size)
    return torch.mean(x, [-3, -2, -1], True) if whole else pooling.adaptive_avg_pool(3, x, size)


def _of(rule: Rule, *first: Any) -> Rule:
    """A rule of several ops, told which."""
    return lambda *args, **kwargs: rule(*first, *args, **kwargs)


def _log_softmax(whole: Rule, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """Of float64, which the kernel refuses, and of scalars."""
    if not x.dim():
        return torch.zeros_like(x)
    if x.dtype is not torch.float64:
        return whole(x, dim, half_to_float)
    below = x - x.amax(dim, True)
    return below - below.exp().sum(dim, True).log()


def _scatter_onto(x: Tensor, dim: int, index: Tensor, src: Tensor, *, reduce: str) -> Tensor:
    kind = {"add": "sum", "multiply": "prod"}[reduce]
    return comparisons.scatter_reduce(x, dim, index, src, kind)


def _scatter_value_onto(x: Tensor, dim: int, index: Tensor, value: float, *, reduce: str) -> Tensor:
    return _scatter_onto(x, dim, index, torch.full_like(index, value, dtype=x.dtype), reduce=reduce)


# torch's rules end in primitives that have no kernel either
_LEAVE = (_aten.gcd.default, _aten.lcm.default, _aten.igamma.default, _aten.igammac.default)
# what may have no kernel
_LACKING: Table = {
    _aten.isposinf.default: lambda x: torch.eq(x, torch.inf),
    _aten.isneginf.default: lambda x: torch.eq(x, -torch.inf),
    _aten.fmax.default: lambda x, y: pointwise.extremum_without_nan(x, y, True),
    _aten.fmin.default: lambda x, y: pointwise.extremum_without_nan(x, y, False),
    _aten.signbit.default: pointwise.signbit,
    _aten.copysign.Tensor: pointwise.copysign,
    _aten.copysign.Scalar: pointwise.copysign,
    _aten.hypot.default: pointwise.hypot,
    _aten.heaviside.default: special.heaviside,
    _aten.frexp.Tensor: special.frexp,
    _aten.nextafter.default: special.nextafter,
    _aten.lgamma.default: special.lgamma,
    _aten.angle.default: special.angle,
    _aten.digamma.default: special.digamma,
    _aten.polygamma.default: special.polygamma,
    _aten.erfc.default: special.erfc,
    _aten.erfinv.default: pointwise.erfinv,
    _aten.i0.default: special.bessel_i0,
    _aten.exp2.default: exact_ops.exp2,
    _aten.std.correction: reductions.std,
    _aten.std_mean.correction: reductions.std_mean,
    _aten.trace.default: views.trace,
    _aten.cumprod.default: cumulative.cumprod,
    _aten.cummax.default: cumulative.cummax,
    _aten.cummin.default: cumulative.cummin,
    _aten.logcumsumexp.default: cumulative.logcumsumexp,
    _aten.histc.default: sorting.histc,
    _aten.sort.default: sorting.sort,
    _aten.sort.stable: lambda x, stable=None, dim=-1, descending=False: sorting.sort(
        x, dim, descending
    ),
    _aten.kthvalue.default: sorting.kthvalue,
    _aten.median.default: sorting.median,
    _aten.median.dim: sorting.median_along,
    _aten.nanmedian.default: sorting.nanmedian,
    _aten.nanmedian.dim: sorting.nanmedian_along,
    _aten.mode.default: sorting.mode,
    _aten.searchsorted.Tensor: sorting.searchsorted,
    _aten.searchsorted.Scalar: sorting.searchsorted,
    _aten.bucketize.Tensor: sorting.bucketize,
    _aten.bucketize.Scalar: sorting.bucketize,
    _aten.diagonal_scatter.default: views.diagonal_scatter,
    _aten.as_strided_scatter.default: comparisons.as_strided_scatter,
    _aten.scatter_reduce.two: comparisons.scatter_reduce,
    _aten.scatter.reduce: _scatter_onto,
    _aten.scatter.value_reduce: _scatter_value_onto,
    _aten.index_reduce.default: indexing.index_reduce,
    _aten.put.default: indexing.put,
    _aten.take.default: indexing.take,
    _aten.embedding_renorm.default: comparisons.embedding_renorm,
    _aten._embedding_bag.default: comparisons.embedding_bag,
    _aten._embedding_bag_forward_only.default: comparisons.embedding_bag,
    _aten.max_pool3d_with_indices.default: _of(pooling.max_pool_with_indices, 3),
    _aten.avg_pool3d.default: exact_ops.average_volumes,
    _aten._adaptive_avg_pool3d.default: _average_volume,
    _aten.adaptive_max_pool2d.default: _of(pooling.adaptive_max_pool, 2),
    _aten.adaptive_max_pool3d.default: _of(pooling.adaptive_max_pool, 3),
    _aten._upsample_bicubic2d_aa.default: resize.bicubic_antialiased,
    _aten.addbmm.default: products.addbmm,
    _aten._trilinear.default: products.trilinear,
    _aten.grid_sampler_3d.default: sampling.grid_sample,
    _aten.empty_permuted.default: _empty,
}
# what a kernel or the delegate computes otherwise for some arguments
_MISCOMPUTED: Table = {
    # XNNPACK computes the exact form in its place
    _aten.gelu.default: plain(pointwise.tanh_gelu),
    _aten.remainder.Tensor: exact_ops.remainder,
    _aten.remainder.Scalar: exact_ops.remainder,
    _aten.upsample_bilinear2d.vec: exact_ops.bilinear,
    _aten.convolution.default: exact_ops.convolution,
    _aten.prelu.default: exact_ops.prelu,
    **scalars.reductions(_aten, {"max.dim": exact_ops.largest_along}),
    _aten._log_softmax.default: _log_softmax,
    **dict.fromkeys(
        (_aten.unfold.default, _aten.unfold_copy.default),
        scalars.of_scalars(lambda x: x.reshape(1), scalars.whole_op),
    ),
    _aten._to_copy.default: lambda whole, x, *, non_blocking=False, **options: whole(x, **options),
    _aten.permute_copy.default: scalars.of_scalars(torch.clone, scalars.whole_op),
    _aten.cumsum.default: plain(cumulative.cumsum),
    _aten.var.correction: lambda whole, x, *args, **kwargs: (
        whole(x, *args, **kwargs) if x.dim() else reductions.var(x, *args, **kwargs)
    ),
    _aten.linalg_vector_norm.default: lambda whole, x, *args, **kwargs: (
        whole(x, *args, **kwargs) if x.dim() else reductions.vector_norm(x, *args, **kwargs)
    ),
    _aten.avg_pool2d.default: exact_ops.of_a_batch,
    _aten.max_pool2d.default: exact_ops.of_a_batch,
    _aten.constant_pad_nd.default: plain(views.pad_or_cut),
    **{op: plain(rule) for op, rule in types.joins_of_one_type(_aten, ["cat"]).items()},
}
# kernels that add up or multiply in 16 bits
for _op in (
    *(_aten.native_layer_norm.default, _aten._cdist_forward.default, _aten.prod.dim_int),
    *(_aten.sum.dim_IntList, _aten.cumsum.default, _aten.avg_pool2d.default),
):
    _MISCOMPUTED[_op] = exact_ops.in_single(_MISCOMPUTED.get(_op, exact_ops.as_it_is))
