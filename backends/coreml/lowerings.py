"""Our ops in coremltools' torch frontend: each becomes a constexpr op, built directly."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from graphopt.backends.coreml.translations import TRANSLATED
from graphopt.extras import require
from graphopt.ir.ops import STORAGE_BITS
from graphopt.numerics.packing import unpack

__all__ = ["numpy_type", "register_lowerings"]


def register_lowerings() -> None:
    """Teach coremltools our ops; calling it again does nothing.

    Raises:
        MissingDependencyError: coremltools is not installed.
    """
    require("coremltools", "coreml")
    from coremltools.converters.mil.frontend.torch.torch_op_registry import (
        _TORCH_OPS_REGISTRY,
        register_torch_op,
    )

    if "graphopt::lut_to_dense" in _TORCH_OPS_REGISTRY.name_to_func_mapping:
        return
    for function in (graphopt_lut_to_dense, graphopt_shift_scale, graphopt_sparse_to_dense):
        name = function.__name__.removeprefix("graphopt_")
        aliases = [f"graphopt::{name}", f"graphopt.{name}"]
        register_torch_op(function, torch_alias=aliases)
    for name, count in _TRACED.items():
        _TORCH_OPS_REGISTRY.set_func_by_name(
            _as_exported(_TORCH_OPS_REGISTRY.get_func(f"quantized_decomposed.{name}"), count),
            f"quantized_decomposed::{name}",
        )
    for name, translation in TRANSLATED.items():
        if name not in _TORCH_OPS_REGISTRY.name_to_func_mapping:
            _TORCH_OPS_REGISTRY.set_func_by_name(translation, name)


# op in traces of torch.jit → number of operands that its translation takes
_TRACED = {
    "quantize_per_tensor": 6,
    "dequantize_per_tensor": 6,
    "dequantize_per_channel": 7,
}


def _as_exported(translation: Callable[..., None], count: int) -> Callable[..., None]:
    """A translation of exported ops for traced ones, which coremltools takes for others of the name."""

    def translate(context: Any, node: Any) -> None:
        from coremltools.converters.mil.frontend.torch.utils import TorchFrontend

        plain, before = copy.copy(node), context.frontend
        plain.inputs = list(node.inputs)[:count]
        context.frontend = TorchFrontend.TORCHEXPORT
        try:
            translation(context, plain)
        finally:
            context.frontend = before

    return translate


def _inputs(context: Any, node: Any) -> list[Any]:
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    return list(_get_inputs(context, node))


def numpy_type(name: str) -> Any:
    """Numpy type of a MIL type, which tags those below a byte."""
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(types.string_to_builtin(name))


def _operand(value: Any) -> Any:
    """A constexpr result as it is, anything else as its constant value."""
    is_constexpr = value.op is not None and value.op.op_type.startswith("constexpr_")
    return value if is_constexpr else value.val


def _ints(value: Any) -> list[int]:
    raw = value.val if hasattr(value, "val") else value
    return [int(getattr(item, "val", item)) for item in np.atleast_1d(raw)]


def _unpacked(data: Any, bits: int, shape: list[int]) -> np.ndarray[Any, Any]:
    packed = torch.from_numpy(np.ascontiguousarray(data.val, dtype=np.uint8))
    return unpack(packed, bits, math.prod(shape)).numpy().reshape(shape)


def graphopt_lut_to_dense(context: Any, node: Any) -> None:
    """`constexpr_lut_to_dense`, in the form of the deployment target."""
    from coremltools.converters.mil.frontend import _utils
    from coremltools.converters.mil.mil import Builder

    values = _inputs(context, node)
    indices, lut = values[0], _operand(values[1])
    n_bits, shape = int(values[2].val), _ints(values[3])
    vector_axis = None
    if len(values) > 4 and values[4] is not None:
        vector_axis = int(values[4].val)
    length = int(values[1].shape[-1])
    index_shape = [
        size // length if axis == vector_axis and length > 1 else size
        for axis, size in enumerate(shape)
    ]
    codes = _unpacked(indices, n_bits, index_shape).astype(numpy_type(f"uint{n_bits}"))
    if _is_ios18():
        options = {} if vector_axis is None else {"vector_axis": np.int32(vector_axis)}
        result = Builder.constexpr_lut_to_dense(indices=codes, lut=lut, name=node.name, **options)
    else:
        # the packed form of iOS 16 and 17, which coremltools builds from the same arrays
        result = _utils._construct_constexpr_lut_op(codes, lut, vector_axis, name=node.name)
    context.add(result, node.name)


def graphopt_shift_scale(context: Any, node: Any) -> None:
    """`constexpr_blockwise_shift_scale`, or `constexpr_affine_dequantize` before iOS 18."""
    from coremltools.converters.mil.mil import Builder, types

    data, scale, offset, storage, shape = _inputs(context, node)[:5]
    kind = str(getattr(storage, "val", storage))
    zero = None if offset is None or not np.any(offset.val) else np.asarray(offset.val)
    if kind == "float":
        stored = _operand(data)
        dtype = types.nptype_from_builtin(data.dtype)
    else:
        dtype = numpy_type(kind)
        stored = _unpacked(data, STORAGE_BITS[kind], _ints(shape))
        stored = stored.view(np.int8).astype(dtype) if kind == "int8" else stored.astype(dtype)
        if kind == "int4":
            stored = np.where(stored >= 8, stored - 16, stored).astype(dtype)
    if not _is_ios18():
        context.add(_affine(stored, np.asarray(scale.val), zero, node.name), node.name)
        return
    options = {} if zero is None else {"offset": zero.astype(dtype)}
    result = Builder.constexpr_blockwise_shift_scale(
        data=stored, scale=np.asarray(scale.val), name=node.name, **options
    )
    context.add(result, node.name)


def graphopt_sparse_to_dense(context: Any, node: Any) -> None:
    """`constexpr_sparse_to_dense` with its mask as bits."""
    from coremltools.converters.mil.mil import Builder

    values, mask, shape = _inputs(context, node)[:3]
    bits = _unpacked(mask, 1, _ints(shape)).astype(numpy_type("uint1"))
    source = values.op
    if source is not None and source.op_type.startswith("constexpr_"):
        values, bits = _sparse_form(source, bits, f"{node.name}_values")
    else:
        values = values.val
    result = Builder.constexpr_sparse_to_dense(nonzero_data=values, mask=bits, name=node.name)
    context.add(result, node.name)


def _sparse_form(source: Any, bits: Any, name: str) -> tuple[Any, Any]:
    """Compressed values of a sparse weight in the form that carries its mask: values and mask."""
    from coremltools.converters.mil.mil import Builder

    rank = bits.ndim
    if source.op_type == "constexpr_lut_to_dense":
        lut = source.lut
        inner = lut.op is not None and lut.op.op_type.startswith("constexpr_")
        # the table of a list has one dimension for it, that of a weight one for each
        shape = [1] * rank + list(lut.shape[-2:])
        if inner:
            given = lut.op.inputs
            table = Builder.constexpr_blockwise_shift_scale(
                data=given["data"].val.reshape(shape),
                scale=given["scale"].val.reshape([1] * (rank + 2)),
                name=f"{name}_lut",
                **(
                    {}
                    if given.get("offset") is None
                    else {"offset": given["offset"].val.reshape([1] * (rank + 2))}
                ),
            )
        else:
            table = lut.val.reshape(shape)
        mask, values = Builder.constexpr_lut_to_sparse(
            indices_mask=bits, indices_nonzero_data=source.indices.val, lut=table, name=name
        )
        return values, mask
    offset = source.offset
    options = {} if offset is None else {"offset": offset.val.reshape([1] * rank)}
    mask, values = Builder.constexpr_sparse_blockwise_shift_scale(
        data_mask=bits,
        nonzero_data=source.data.val,
        scale=source.scale.val.reshape([1] * rank),
        name=name,
        **options,
    )
    return values, mask


def _affine(stored: Any, scale: Any, zero: Any, name: str) -> Any:
    """The dequantize op of iOS 16 and 17: one scale, or one per index of one axis."""
    from coremltools.converters.mil.mil import Builder

    axes = [axis for axis, count in enumerate(scale.shape) if count > 1]
    axis = axes[0] if axes else 0
    zeros = np.zeros(scale.shape) if zero is None else zero
    flat = (-1,) if axes else ()
    return Builder.constexpr_affine_dequantize(
        quantized_data=stored,
        zero_point=zeros.astype(stored.dtype).reshape(flat),
        scale=scale.reshape(flat),
        axis=np.int32(axis),
        name=name,
    )


def _is_ios18() -> bool:
    from coremltools import target
    from coremltools.converters.mil.mil.block import is_current_opset_version_compatible_with

    return bool(is_current_opset_version_compatible_with(target.iOS18))
