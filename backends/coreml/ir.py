"""Weights inside a Core ML model that is already built: finding and replacing its constants."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.backends.coreml.lowerings import numpy_type
from graphopt.backends.quiet import quiet
from graphopt.errors import InputError
from graphopt.extras import require
from graphopt.ir.ops import STORAGE_BITS
from graphopt.numerics.packing import unpack
from graphopt.schemes.palettize import PalettizedWeight
from graphopt.schemes.quantize import QuantizedWeight

__all__ = ["BuiltProgram", "Weight", "open_model"]

_log = logging.getLogger(__name__)
_IOS16, _IOS17, _IOS18 = 7, 8, 9  # specification versions
# op → input that is a weight → its output-channel axis
_SLOTS = {
    "conv": {"weight": 0},
    "linear": {"weight": 0},
    "conv_transpose": {"weight": 1},
    "gather": {"x": 0},
    "gather_along_axis": {"x": 0},
    "gather_nd": {"x": 0},
}
_RECURRENT = ("lstm", "gru", "rnn")
_OLD_FORMS = ("constexpr_lut_to_dense", "constexpr_sparse_to_dense")  # changed with iOS 18
# gather counts negative indices from the end before iOS 17 and not after it
_GUARDS = (
    "common::guard_negative_gather_indices",
    "common::const_elimination",
    "common::dead_code_elimination",
)


@dataclass(frozen=True)
class Weight:
    """A constant that is a weight of all its users.

    Attributes:
        name: Name of the constant, as coremltools' configs have it.
        op: Its op.
        users: (name, type) of the ops that read it.
        shape: Its shape.
        output_axis: Output-channel axis.
        ambiguous: Whether its users do not agree on the output axis.
    """

    name: str
    op: Any
    users: tuple[tuple[str, str], ...]
    shape: tuple[int, ...]
    output_axis: int
    ambiguous: bool

    def value(self) -> Tensor:
        """The values, copied."""
        return torch.from_numpy(np.array(self.op.outputs[0].val))


@dataclass(frozen=True)
class BuiltProgram:
    """The MIL program of a model, with what is needed to make a model of it again.

    Attributes:
        program: The program.
        spec: The model's specification.
        version: Specification version to write.
        compute_units: Of the model.
    """

    program: Any
    spec: Any
    version: int
    compute_units: Any

    def weights(self) -> list[Weight]:
        """All weights, in the order of the program; what is compressed already is none."""
        weights = []
        for function in self.program.functions.values():
            for op in _constants(function):
                weight = _as_weight(op)
                if weight is not None:
                    weights.append(weight)
        return weights

    def replace(self, weight: Weight, stored: PalettizedWeight | QuantizedWeight) -> None:
        """Put a compressed form in a constant's place."""
        op = weight.op
        block = op.enclosing_block
        with block:  # sets the opset that the builder takes its ops from
            made = _emit(op, stored, modern=self.version >= _IOS18)
            block.replace_uses_of_var_after_op(
                anchor_op=op, old_var=op.outputs[0], new_var=made, no_check_var_types=True
            )
            block.remove_ops([op])

    def model(self) -> Any:
        """A model of the program, not loaded; no other pass runs."""
        from coremltools.converters.mil.converter import mil_convert
        from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

        program, described = self.program, self.spec.description
        program.skip_all_passes = True
        with quiet("coremltools"):
            if described.functions:
                program.export_as_multifunction = True
                program.default_function_name = described.defaultFunctionName
                # the loader gives each function its own copy of what they share
                shared = PASS_REGISTRY["common::const_deduplication"]
                shared._deduplicate_const_across_functions(program)
            return mil_convert(
                program,
                convert_from="milinternal",
                convert_to="mlprogram",
                specification_version=self.version,
                compute_units=self.compute_units,
                model_description=described,
                skip_model_load=True,
            )


def open_model(model: Any, *, modern: bool) -> BuiltProgram:
    """Read a model's program.

    Args:
        model: An `MLModel` of type ML program, loaded from disk or just converted.
        modern: Whether forms of iOS 18 are needed; an older model is then raised to it.

    Raises:
        InputError: It is no `MLModel`, or of another type, or cannot be read or raised.
        MissingDependencyError: coremltools is not installed.
    """
    with quiet("coremltools"):
        ct = require("coremltools", "coreml")
    if not isinstance(model, ct.models.MLModel):
        raise InputError(
            f"expected a coremltools MLModel, got {type(model).__name__}; a saved package is opened"
            " with coremltools.models.MLModel(path, skip_model_load=True)"
        )
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    spec = model.get_spec()
    if spec.WhichOneof("Type") != "mlProgram":
        raise InputError(
            f"the model is a {spec.WhichOneof('Type')}, not an ML program; convert it again with"
            " convert_to='mlprogram'"
        )
    before = spec.specificationVersion
    version = max(before, _IOS18 if modern else _IOS16)
    try:
        with quiet("coremltools"):
            program = load(spec, version, model.weights_dir)
            if before < _IOS17 <= version:
                for name in _GUARDS:
                    PASS_REGISTRY[name](program)
    except Exception as error:
        held = sorted(set(_OLD_FORMS) & _op_types(spec)) if before < _IOS18 <= version else []
        raise InputError(
            f"the model (specification {before}) cannot be read as specification {version}: "
            + (
                f"it holds weights as {', '.join(held)} of before iOS 18; compress the uncompressed"
                " model, or convert it for iOS 18 first"
                if held
                else str(error)
            )
        ) from error
    if version > before:
        _log.warning(
            "the compressed model needs specification version %d (iOS %d); the given one has %d",
            version,
            {_IOS16: 16, _IOS17: 17}.get(version, 18),
            before,
        )
    return BuiltProgram(program, spec, version, model.compute_unit)


def _op_types(spec: Any) -> set[str]:
    return {
        op.type
        for function in spec.mlProgram.functions.values()
        for block in function.block_specializations.values()
        for op in block.operations
    }


def _constants(block: Any) -> Iterator[Any]:
    for op in list(block.operations):
        for inner in op.blocks:
            yield from _constants(inner)
        if op.op_type == "const":
            yield op


def _as_weight(op: Any) -> Weight | None:
    var = op.outputs[0]
    value = var.val
    if not isinstance(value, np.ndarray) or value.dtype not in (np.float16, np.float32):
        return None
    blocks = (op.enclosing_block, *var.consuming_blocks)
    if value.ndim < 2 or not var.child_ops or any(var in block.outputs for block in blocks):
        return None
    uses = [
        (user, slot)
        for user in dict.fromkeys(var.child_ops)
        for slot, given in user.inputs.items()
        if given is var
    ]
    axes = {_output_axis(user, slot, var) for user, slot in uses}
    known = {axis for axis in axes if axis is not None}
    if known != axes or not known:
        return None
    users = tuple((user.name, user.op_type) for user, _ in uses)
    return Weight(op.name, op, users, value.shape, min(known), len(known) > 1)


def _output_axis(op: Any, slot: str, var: Any) -> int | None:
    kind = op.op_type
    if kind in _SLOTS:
        return _SLOTS[kind].get(slot)
    if kind == "matmul":
        turned = getattr(op, f"transpose_{slot}", None)
        is_turned = turned is not None and bool(turned.val)
        last = (slot == "y") != is_turned
        return int(var.rank) - (1 if last else 2)
    if kind in _RECURRENT and slot.startswith("weight"):
        return 0
    return None


def _emit(op: Any, stored: PalettizedWeight | QuantizedWeight, *, modern: bool) -> Any:
    dtype = op.outputs[0].val.dtype
    emit: dict[str, Callable[..., Any]] = {
        PalettizedWeight.kind: _lookup,
        QuantizedWeight.kind: _integers,
    }
    return emit[stored.kind](op, stored, dtype, modern)


def _lookup(op: Any, stored: PalettizedWeight, dtype: Any, modern: bool) -> Any:
    from coremltools.converters.mil.frontend import _utils
    from coremltools.converters.mil.mil import Builder

    name, place = f"{op.name}_palettized", {"before_op": op}
    shape, table_shape = stored.layout.index_shape(), stored.lut_shape()
    codes = unpack(stored.indices, stored.n_bits, math.prod(shape)).numpy().reshape(shape)
    codes = codes.astype(numpy_type(f"uint{stored.n_bits}"))
    if not modern:
        table = stored.lut.numpy().reshape(table_shape)
        return _utils._construct_constexpr_lut_op(codes, table, None, name=name, **place)
    if stored.lut_storage is None:
        table = stored.lut.numpy().reshape(table_shape)
    else:
        assert stored.lut_scale is not None
        zeros = stored.lut_offset
        offset = (
            {}
            if zeros is None
            else {"offset": zeros.numpy().astype(numpy_type(stored.lut_storage))}
        )
        table = Builder.constexpr_blockwise_shift_scale(
            data=_elements(stored.lut, stored.lut_storage, table_shape),
            scale=stored.lut_scale.numpy().astype(dtype),
            name=f"{op.name}_lut",
            **offset,
            **place,
        )
    axis = stored.op_vector_axis
    vector = {} if axis is None else {"vector_axis": np.int32(axis)}
    made = Builder.constexpr_lut_to_dense(indices=codes, lut=table, name=name, **vector, **place)
    if stored.channel_scale is None:
        return made
    return Builder.constexpr_blockwise_shift_scale(
        data=made, scale=stored.channel_scale.numpy().astype(dtype), name=f"{name}_pcs", **place
    )


def _integers(op: Any, stored: QuantizedWeight, dtype: Any, modern: bool) -> Any:
    from coremltools.converters.mil.mil import Builder

    counts, kind = stored.blocks.counts, numpy_type(stored.storage)
    data = _elements(stored.data, stored.storage, stored.blocks.shape)
    scale = stored.scale.numpy().astype(dtype).reshape(counts)
    zeros = None if stored.offset is None else stored.offset.numpy().reshape(counts).astype(kind)
    name, place = f"{op.name}_quantized", {"before_op": op}
    if modern:
        offset = {} if zeros is None else {"offset": zeros}
        return Builder.constexpr_blockwise_shift_scale(
            data=data, scale=scale, name=name, **offset, **place
        )
    axes = [axis for axis, count in enumerate(counts) if count > 1]
    flat = (-1,) if axes else ()
    points = (np.zeros(counts) if zeros is None else zeros).astype(data.dtype)
    return Builder.constexpr_affine_dequantize(
        quantized_data=data,
        zero_point=points.reshape(flat),
        scale=scale.reshape(flat),
        axis=np.int32(axes[0] if axes else 0),
        name=name,
        **place,
    )


def _elements(packed: Tensor, storage: str, shape: Any) -> Any:
    bits = STORAGE_BITS[storage]
    raw = unpack(packed, bits, math.prod(shape)).numpy().reshape(shape).astype(np.int16)
    if storage.startswith("int"):
        raw = np.where(raw >= 2 ** (bits - 1), raw - 2**bits, raw)
    return raw.astype(numpy_type(storage))
