"""Weights inside a Core AI program: finding its constants and replacing them by compressed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.audited import module_of
from graphopt.backends.quiet import quiet
from graphopt.extras import require
from graphopt.numerics.packing import pack
from graphopt.schemes.base import StoredWeight
from graphopt.schemes.palettize import PalettizedWeight
from graphopt.schemes.prune import PrunedWeight
from graphopt.schemes.quantize import QuantizedWeight

__all__ = ["Constant", "find_constants", "replace_constant"]

_FLOATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_DTYPES = {name: dtype for dtype, name in _FLOATS.items()}
_STORED = {
    "int2": "si2",
    "int4": "si4",
    "int8": "si8",
    "uint2": "ui2",
    "uint4": "ui4",
    "uint8": "ui8",
    "fp8_e4m3": "f8E4M3FN",
    "fp8_e5m2": "f8E5M2",
    "fp4_e2m1": "f4E2M1FN",
}
_SCALES = "f8E8M0FNU"
# op → operand that is a weight, its output-channel axis and its input-channel axis
_WEIGHTS = {
    "coreai.conv2d": (1, 0, 1),
    "coreai.conv3d": (1, 0, 1),
    "coreai.conv_transpose2d": (1, 1, 0),
    "coreai.conv_transpose3d": (1, 1, 0),
    "coreai.gather_nd": (0, 0, 1),
}
_PRODUCTS = ("coreai.batch_matmul", "coreai.decomposable.broadcasting_batch_matmul")


@dataclass(frozen=True)
class Constant:
    """A weight of a program.

    Attributes:
        op: The constant's op in the IR.
        name: What its location says of where it comes from, or its op.
        shape: Its shape.
        dtype: Its type.
        users: Ops that it is a weight of, through transposes and casts.
        output_axis: Output-channel axis of the constant.
        input_axis: Input-channel axis, None where there is none.
        ambiguous: Whether its users do not agree on the output axis.
    """

    op: Any
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    users: tuple[str, ...]
    output_axis: int
    input_axis: int | None
    ambiguous: bool

    def value(self) -> Tensor:
        """The values, copied."""
        raw = _raw(self.op, math.prod(self.shape) * torch.finfo(self.dtype).bits // 8)
        return torch.from_numpy(raw).view(self.dtype).reshape(self.shape)


def _ir() -> Any:
    """The IR's Python package; its dialect can be imported only after `coreai.authoring`."""
    with quiet("coreai"):
        require("coreai.authoring", "coreai")
        return module_of("coreai._compiler.ir")


def _raw(op: Any, size: int) -> Any:
    _ir()
    bindings = module_of("coreai._compiler._mlir_libs._coreaiIR")._bindings
    buffer = np.zeros(max(1, size), dtype=np.uint8)
    bindings.compiler.copy_constant_value_to_array(constant_op=op, destination=buffer)
    return buffer


def find_constants(program: Any, least: int) -> list[Constant]:
    """Float constants of more than `least` elements that are weights of all their users, in order."""
    ir = _ir()
    ops: list[Any] = []

    def note(op: Any) -> Any:
        if op.name == "coreai.constant":
            ops.append(op)
        return ir.WalkResult.ADVANCE

    program._module._mlir_module.operation.walk(note, ir.WalkOrder.PRE_ORDER)
    return [constant for op in ops if (constant := _as_weight(ir, op, least)) is not None]


def _as_weight(ir: Any, op: Any, least: int) -> Constant | None:
    kind = op.results[0].type
    if not isinstance(kind, ir.RankedTensorType) or not kind.has_static_shape:
        return None
    shape, dtype = tuple(int(size) for size in kind.shape), _DTYPES.get(str(kind.element_type))
    if dtype is None or math.prod(shape) <= least or len(shape) < 2:
        return None
    value = op.attributes["value"]
    if isinstance(value, ir.DenseElementsAttr) and value.is_splat:
        return None
    uses = list(_uses(op.results[0], list(range(len(shape)))))
    if not uses or any(output is None for _, output, _ in uses):
        return None
    outputs = [output for _, output, _ in uses if output is not None]
    users = tuple(dict.fromkeys(name for name, _, _ in uses))
    return Constant(
        op, _name(op), shape, dtype, users, outputs[0], uses[0][2], len(set(outputs)) > 1
    )


def _uses(value: Any, axes: list[int]) -> Iterator[tuple[str, int | None, int | None]]:
    """(op, output axis, input axis) of each use; no output axis where it is no weight's place.

    Args:
        value: What is used.
        axes: Axis of the constant that each axis of the value is.
    """
    rank = len(axes)
    for use in value.uses:
        op, operand = use.owner, use.operand_number
        if op.name == "coreai.transpose" and operand == 0:
            order = _integers(op.operands[1].owner)
            yield from _uses(op.results[0], [axes[place] for place in order])
        elif op.name == "coreai.cast" and operand == 0:
            yield from _uses(op.results[0], axes)
        elif op.name in _PRODUCTS and operand in (0, 1) and rank >= 2:
            last, before = (rank - 1, rank - 2) if operand == 1 else (rank - 2, rank - 1)
            yield op.name, axes[last], axes[before]
        elif op.name in _WEIGHTS and operand == _WEIGHTS[op.name][0]:
            _, output, inputs = _WEIGHTS[op.name]
            yield op.name, axes[output], axes[inputs] if inputs < rank else None
        else:
            yield op.name, None, None


def _integers(op: Any) -> list[int]:
    kind = op.results[0].type
    bits = kind.element_type.width
    raw = _raw(op, math.prod(kind.shape) * bits // 8)
    dtype = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    return [int(value) for value in torch.from_numpy(raw).view(dtype)]


def _name(op: Any) -> str:
    text = str(op.location)
    _, marker, rest = text.partition('identifiers = ["')
    return rest.partition('"')[0] if marker else op.name


def replace_constant(
    constant: Constant,
    stored: StoredWeight,
    values: StoredWeight | None = None,
) -> None:
    """Put a compressed form in a constant's place.

    Args:
        constant: What it replaces.
        stored: Its tables, integers, or mask and values.
        values: For a pruned weight, the compressed form of its values, 1-D.
    """
    ir = _ir()
    op = constant.op
    old = op.results[0]
    with op.context, op.location, ir.InsertionPoint(op):
        build = _Builder(ir, _FLOATS[constant.dtype])
        new = build.stored(stored, values)
        # the verifier lets some wrong ranks through that the runtime does not survive
        assert new.type == old.type, f"{new.type} is no {old.type}"
        old.replace_all_uses_with(new)
    op.erase()


class _Builder:
    """Emits ops at the current insertion point.

    Args:
        ir: The IR's package.
        float_type: Element type of the dense weight.
    """

    def __init__(self, ir: Any, float_type: str) -> None:
        self.ir, self.float_type = ir, float_type
        # only now: the dialect's import needs the authoring package loaded
        self.dialect = module_of("coreai._compiler.dialects.coreai")
        self._elements: Callable[..., Any] = module_of(
            "coreai._compiler.dialects.coreai.constant"
        ).create_elements_attr

    def stored(self, form: StoredWeight, values: StoredWeight | None = None) -> Any:
        """The dense value of a stored weight; `values` are those of a pruned one, if compressed."""
        emit: dict[str, Callable[..., Any]] = {
            PalettizedWeight.kind: self.lookup,
            QuantizedWeight.kind: self.integers,
            PrunedWeight.kind: partial(self.sparse, values=values),
        }
        return emit[form.kind](form)

    def lookup(self, stored: PalettizedWeight) -> Any:
        shape = list(stored.layout.index_shape())
        packed = self.raw(stored.indices, f"ui{stored.n_bits}", shape)
        table_shape = stored.lut_shape()
        axis = self.numbers(torch.tensor(stored.op_vector_axis or 0), "si16")
        if stored.lut_storage is None:
            table = self.floats(stored.lut.reshape(table_shape), self.float_type)
            dense = self.dialect.lut_to_dense(packed, table, axis)
        else:
            name = _STORED[stored.lut_storage]
            table = self.raw(stored.lut, name, table_shape)
            dense = self.dialect.lut_to_dense(packed, table, axis)
            assert stored.lut_scale is not None
            scale = stored.lut_scale[..., 0, 0]
            zeros = None if stored.lut_offset is None else stored.lut_offset[..., 0, 0]
            dense = self.scaled(dense, scale, zeros, name)
        if stored.channel_scale is not None:
            dense = self.scaled(dense, stored.channel_scale, None, self.float_type)
        return dense

    def integers(self, stored: QuantizedWeight) -> Any:
        name = _STORED[stored.storage]
        data = self.raw(stored.data, name, list(stored.blocks.shape))
        scale = stored.scale.reshape(stored.blocks.counts)
        offset = None if stored.offset is None else stored.offset.reshape(stored.blocks.counts)
        powers = name == "f4E2M1FN" or (name.startswith("f8") and _are_powers(scale))
        return self.scaled(data, scale, offset, name, powers=powers)

    def sparse(self, stored: PrunedWeight, values: StoredWeight | None) -> Any:
        kept = (
            self.floats(stored.values, self.float_type) if values is None else self.stored(values)
        )
        mask = self.raw(stored.mask, "ui1", list(stored.shape))
        return self.dialect.sparse_with_bitmask_to_dense(
            self.dialect.build_sparse_with_bitmask(kept, mask)
        )

    def scaled(
        self, data: Any, scale: Tensor, offset: Tensor | None, name: str, *, powers: bool = False
    ) -> Any:
        """`scale · (data − offset)`, one scale per block."""
        zeros = torch.zeros(scale.shape)
        if powers:
            exponents = (torch.frexp(scale.float())[1] + 126).to(torch.uint8)
            factors = self.raw(exponents, _SCALES, list(scale.shape))
        else:
            factors = self.floats(scale, self.float_type)
        moved = self.numbers(zeros if offset is None else offset, name)
        return self.dialect.blockwise_shift_scale(
            data, factors, moved, self.floats(zeros, self.float_type)
        )

    def floats(self, values: Tensor, name: str) -> Any:
        return self.numbers(values.to(_DTYPES[name]), name)

    def numbers(self, values: Tensor, name: str) -> Any:
        """A constant of logical values; equal ones are stored once."""
        flat, shape = values.detach().cpu().contiguous().reshape(-1), list(values.shape)
        if flat.numel() and bool((flat == flat[0]).all()):
            kind = self.type_of(name)
            number = float(flat[0])
            whole = isinstance(kind, self.ir.IntegerType)
            attribute = (
                self.ir.IntegerAttr.get(kind, int(number))
                if whole
                else self.ir.FloatAttr.get(kind, number)
            )
            tensor = self.ir.RankedTensorType.get(shape, kind)
            value = self.ir.DenseElementsAttr.get_splat(tensor, attribute)
            return self.dialect.ConstantOp(value=value).result
        if name in _DTYPES:
            return self.raw(flat.to(_DTYPES[name]).view(torch.uint8), name, shape)
        bits = int(name.lstrip("siu")) if name[0] in "su" else 8
        if bits < 8:
            codes = (flat.to(torch.int16) & (2**bits - 1)).to(torch.uint8)
            return self.raw(pack(codes, bits), name, shape)
        dtype = torch.int8 if name == "si8" else torch.uint8
        return self.raw(flat.to(dtype).view(torch.uint8), name, shape)

    def raw(self, data: Tensor, name: str, shape: list[int]) -> Any:
        """A constant of bytes, elements packed least significant bit first as ours are."""
        tensor = self.ir.RankedTensorType.get(shape, self.type_of(name))
        array: Any = np.ascontiguousarray(data.detach().cpu().reshape(-1).numpy())
        if name in _DTYPES or name.startswith("f8"):
            array = array.view(_numpy_type(name))
        elif name == "si8":
            array = array.view(np.int8)
        attribute = self._elements(self.ir.Location.current, tensor, array)
        return self.dialect.ConstantOp(value=attribute).result

    def type_of(self, name: str) -> Any:
        kinds = {
            "f32": "F32Type",
            "f16": "F16Type",
            "bf16": "BF16Type",
            "f8E4M3FN": "Float8E4M3FNType",
            "f8E5M2": "Float8E5M2Type",
            "f8E8M0FNU": "Float8E8M0FNUType",
            "f4E2M1FN": "Float4E2M1FNType",
        }
        if name in kinds:
            return getattr(self.ir, kinds[name]).get()
        width = int(name[2:])
        signed = name.startswith("si")
        make = self.ir.IntegerType.get_signed if signed else self.ir.IntegerType.get_unsigned
        return make(width)


def _numpy_type(name: str) -> Any:
    import ml_dtypes

    return {
        "f32": np.float32,
        "f16": np.float16,
        "bf16": ml_dtypes.bfloat16,
        "f8E4M3FN": ml_dtypes.float8_e4m3fn,
        "f8E5M2": ml_dtypes.float8_e5m2,
        "f8E8M0FNU": ml_dtypes.float8_e8m0fnu,
    }[name]


def _are_powers(scale: Tensor) -> bool:
    return bool((torch.frexp(scale.float())[0] == 0.5).all())
