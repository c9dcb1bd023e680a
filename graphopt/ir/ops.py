"""The op vocabulary of compressed programs, registered with torch under `graphopt::`.

Each op has an eager and a fake implementation and works on any device. They nest: a quantized table
is `lut_to_dense(indices, shift_scale(table, scale, …), …)`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from graphopt.audited import module_of
from graphopt.numerics.affine import dequantize, grid_of, quantize, ranged_qparams
from graphopt.numerics.blocks import Blocks
from graphopt.numerics.packing import packed_size, unpack
from graphopt.numerics.row_parts import packed_rows, parts_of_rows, rows_of_blocks
from graphopt.specs import QuantizationFormulation, QuantizationScheme, QuantizationSpec
from graphopt.specs.dtypes import parse_dtype

__all__ = [
    "STORAGE_BITS",
    "is_ours",
    "lut_to_dense",
    "round_by_range",
    "round_to_float",
    "shift_scale",
    "sparse_to_dense",
]

_FLOAT_STORAGE: dict[str, torch.dtype] = {
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

STORAGE_BITS: dict[str, int] = {
    **{f"{sign}int{bits}": bits for sign in ("", "u") for bits in range(2, 9)},
    "fp8_e4m3": 8,
    "fp8_e5m2": 8,
    "fp4_e2m1": 4,
}


def is_ours(node: fx.Node) -> bool:
    """Whether a node calls an op of this vocabulary."""
    return getattr(node.target, "namespace", None) == "graphopt"


# saved programs use the ecosystem's quantize ops, which torch registers with this module only
module_of("torch.ao.quantization.fx._decomposed")
_library = torch.library.Library("graphopt", "DEF")
_library.define(
    "lut_to_dense(Tensor indices, Tensor lut, int n_bits, int[] shape, int? vector_axis=None)"
    " -> Tensor"
)
_library.define(
    "shift_scale(Tensor data, Tensor scale, Tensor? offset, str storage, int[] shape,"
    " ScalarType out_dtype) -> Tensor"
)
_library.define("sparse_to_dense(Tensor values, Tensor mask, int[] shape) -> Tensor")
_library.define("round_to_float(Tensor x, float scale, str storage) -> Tensor")
_library.define(
    "round_by_range(Tensor x, int[] blocks, str storage, str scheme, bool minimum) -> Tensor"
)
_library.define("dropout(Tensor x, float p, str kind) -> Tensor")


def lut_to_dense(
    indices: Tensor,
    lut: Tensor,
    n_bits: int,
    shape: Sequence[int],
    vector_axis: int | None = None,
) -> Tensor:
    """Look every element up in the table of its group.

    `out[i] = lut[group(i), indices[i]]`, where `group(i)_a = i_a · n_lut_a // shape_a` on each axis
    `a`; with entries of length V > 1, element `j` of an entry lands at `V · i_a + j` on
    `vector_axis`.

    Args:
        indices: Packed codes, uint8 [ceil(numel / V · n_bits / 8)] (`graphopt.numerics.packing`).
        lut: [n_lut_0 … n_lut_{K-1}, 2**n_bits, V], each n_lut_a dividing the axis it serves.
        n_bits: Width of one code, 1 … 8.
        shape: Shape of the result, rank K.
        vector_axis: Axis along which entries lie; needed where V > 1.

    Returns:
        Dense tensor of `shape`, dtype of `lut`.

    Examples:
        >>> table = torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 4, 1)  # one for the whole weight
        >>> lut_to_dense(torch.tensor([0b11100100], dtype=torch.uint8), table, 2, (2, 2))
        tensor([[-1.,  0.],
                [ 1.,  2.]])
    """
    index_shape = _index_shape(lut, shape, vector_axis)
    rows = parts_of_rows(index_shape, lut)
    if rows is None:
        return _looked_up(indices, lut, n_bits, index_shape, vector_axis).reshape(list(shape))
    length = int(lut.shape[-1]) if vector_axis == 0 else 1
    dense = lut.new_empty(list(shape))
    for first, last in rows:
        part = packed_rows(indices, n_bits, math.prod(index_shape[1:]), first, last)
        values = _looked_up(part, lut, n_bits, index_shape, vector_axis, first, last)
        dense[first * length : last * length] = values
    return dense


def _looked_up(
    indices: Tensor,
    lut: Tensor,
    n_bits: int,
    index_shape: Sequence[int],
    vector_axis: int | None,
    first: int = 0,
    last: int | None = None,
) -> Tensor:
    """Rows `first` … `last` − 1 of the codes, looked up."""
    sizes = [(index_shape[0] if last is None else last) - first, *index_shape[1:]]
    codes = unpack(indices, n_bits, math.prod(sizes)).to(torch.int32)
    entries, length = lut.shape[-2], lut.shape[-1]
    groups = lut.shape[:-2]
    if math.prod(groups) > 1:
        offset = torch.zeros([1] * len(sizes), dtype=torch.int32, device=lut.device)
        stride = entries
        for axis in reversed(range(len(groups))):
            if groups[axis] > 1:
                begin = first if axis == 0 else 0
                group = torch.arange(
                    begin, begin + sizes[axis], dtype=torch.int32, device=lut.device
                )
                whole = index_shape[axis] // groups[axis]
                group = torch.div(group, whole, rounding_mode="floor") * stride
                offset = offset + group.reshape(
                    [-1 if a == axis else 1 for a in range(len(groups))]
                )
            stride *= groups[axis]
        codes = (codes.reshape(sizes) + offset).reshape(-1)
    if length == 1:
        return lut.reshape(-1).index_select(0, codes).reshape(sizes)
    assert vector_axis is not None
    blocks = lut.reshape(-1, length).index_select(0, codes).reshape([*sizes, length])
    joined = [size * length if axis == vector_axis else size for axis, size in enumerate(sizes)]
    return blocks.movedim(-1, vector_axis + 1).reshape(joined)


def _index_shape(lut: Tensor, shape: Sequence[int], vector_axis: int | None) -> list[int]:
    length = int(lut.shape[-1])
    if length > 1 and vector_axis is None:
        raise ValueError(f"entries of length {length} need vector_axis")
    return [
        size // length if axis == vector_axis and length > 1 else size
        for axis, size in enumerate(shape)
    ]


def shift_scale(
    data: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    storage: str,
    shape: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    """Block-wise affine dequantization: `out = scale · (data − offset)`.

    Args:
        data: Packed elements, uint8 [ceil(numel · bits / 8)]; with storage "float" the elements
            themselves, of `shape`.
        scale: One scale per block, rank of `shape`, each dimension dividing that of `shape`; a
            float8_e8m0fnu scale is a power of two.
        offset: None, or zero points / float minima of the shape of `scale`.
        storage: Element type: "int2" … "int8", "uint2" … "uint8", "fp8_e4m3", "fp8_e5m2",
            "fp4_e2m1", or "float".
        shape: Shape of the result.
        out_dtype: Type of the result.

    Returns:
        Dense tensor of `shape` and `out_dtype`.

    Examples:
        >>> codes = torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8)  # 255 is −1
        >>> scale = torch.tensor([[0.5], [2.0]])  # one per row
        >>> shift_scale(codes.reshape(-1), scale, None, "int8", (2, 2), torch.float32)
        tensor([[ 0.0000,  0.5000],
                [ 4.0000, -2.0000]])
    """
    given = [scale] if offset is None else [scale, offset]
    rows = parts_of_rows(shape, data, *given)
    if rows is None:
        return _scaled(_elements(data, storage, list(shape)), scale, offset, shape).to(out_dtype)
    dense = data.new_empty(list(shape), dtype=out_dtype)
    for first, last in rows:
        sizes = [last - first, *shape[1:]]
        part = data[first:last]
        if storage != "float":
            bits = STORAGE_BITS[storage]
            part = packed_rows(data, bits, math.prod(shape[1:]), first, last)
        blocks = [rows_of_blocks(tensor, shape[0], first, last) for tensor in given]
        dense[first:last] = _scaled(
            _elements(part, storage, sizes), blocks[0], blocks[1] if blocks[1:] else None, sizes
        )
    return dense


def _scaled(elements: Tensor, scale: Tensor, offset: Tensor | None, shape: Sequence[int]) -> Tensor:
    value = elements.to(torch.float32)
    if offset is not None:
        value = value - _expand_blocks(offset.to(torch.float32), shape)
    return value * _expand_blocks(scale.to(torch.float32), shape)


def _elements(data: Tensor, storage: str, shape: list[int]) -> Tensor:
    if storage == "float":
        return data.reshape(shape)
    if storage in _FLOAT_STORAGE:
        return data.view(_FLOAT_STORAGE[storage]).reshape(shape).to(torch.float32)
    bits = STORAGE_BITS[storage]
    codes = unpack(data, bits, math.prod(shape)).reshape(shape)
    if storage == "fp4_e2m1":
        table = torch.tensor([*_FP4_VALUES, *(-value for value in _FP4_VALUES)], device=data.device)
        return table[codes.long()]
    value = codes.to(torch.int16)
    if storage.startswith("int"):
        value = torch.where(value >= 2 ** (bits - 1), value - 2**bits, value)
    return value


def _expand_blocks(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    for axis, size in enumerate(shape):
        if blocks.shape[axis] not in (1, size):
            blocks = blocks.repeat_interleave(size // blocks.shape[axis], dim=axis)
    return blocks


def sparse_to_dense(values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Scatter the non-zero values to the places whose mask bit is set.

    Args:
        values: [number of set bits], in row-major order.
        mask: Packed bits, uint8 [ceil(numel / 8)].
        shape: Shape of the result.

    Returns:
        Dense tensor of `shape`, dtype of `values`.

    Examples:
        >>> mask = torch.tensor([0b0110], dtype=torch.uint8)
        >>> sparse_to_dense(torch.tensor([3.0, 4.0]), mask, (2, 2))
        tensor([[0., 3.],
                [4., 0.]])
    """
    kept = unpack(mask, 1, math.prod(shape)).to(torch.bool)
    dense = torch.zeros(math.prod(shape), dtype=values.dtype, device=values.device)
    dense[kept] = values
    return dense.reshape(list(shape))


def round_to_float(x: Tensor, scale: float, storage: str) -> Tensor:
    """Round an activation to a narrow float type: `out = scale · cast(clamp(x / scale))`.

    The `quantized_decomposed` ops round to integers first, which loses what a float type is for.

    Args:
        x: Any float tensor.
        scale: One scale.
        storage: "fp8_e4m3" or "fp8_e5m2".

    Returns:
        Tensor of the shape and dtype of `x`.

    Examples:
        >>> round_to_float(torch.tensor([1.06, 500.0]), 1.0, "fp8_e4m3")
        tensor([  1., 448.])
    """
    kind = _FLOAT_STORAGE[storage]
    largest = torch.finfo(kind).max
    scaled = (x.to(torch.float32) * (1.0 / scale)).clamp(-largest, largest)
    return (scaled.to(kind).to(torch.float32) * scale).to(x.dtype)


def round_by_range(
    x: Tensor, blocks: Sequence[int], storage: str, scheme: str, minimum: bool = False
) -> Tensor:
    """Round an activation with scales of its own range, found at each call.

    `out = scale · (clamp(round(x / scale) + offset) − offset)` with scale and offset from the least
    and the largest value of each block, as `graphopt.numerics.affine.qparams` gives them.

    Args:
        x: Any float tensor.
        blocks: Extent of a block along each axis, -1 being the whole axis; [] for one scale.
        storage: "int8", "uint8", …, "fp8_e4m3", "fp8_e5m2".
        scheme: "symmetric" or "asymmetric".
        minimum: Whether the offset is a fraction (MINVAL), not a zero point.

    Returns:
        Tensor of the shape and dtype of `x`.

    Examples:
        >>> rows = torch.tensor([[0.0, 0.3, 1.0], [0.0, 30.0, 100.0]])
        >>> round_by_range(rows, [1, -1], "uint2", "asymmetric")  # one scale per row
        tensor([[  0.0000,   0.3333,   1.0000],
                [  0.0000,  33.3333, 100.0000]])
    """
    if x.numel() == 0:
        return x.clone()
    spec = _spec_of(storage, scheme, minimum)
    grid, divided = grid_of(spec), Blocks.of(x.shape, blocks)
    parts = divided.split(x.to(torch.float32))
    low, high = torch.aminmax(parts, dim=1, keepdim=True)
    scale, offset = ranged_qparams(low, high, spec)
    codes = quantize(parts, scale, offset, grid, whole=not minimum)
    return divided.join(dequantize(codes, scale, offset)).to(x.dtype)


@functools.cache
def _spec_of(storage: str, scheme: str, minimum: bool) -> QuantizationSpec:
    formulation = QuantizationFormulation.MINVAL if minimum else QuantizationFormulation.ZP
    return QuantizationSpec(
        dtype=parse_dtype(storage), qscheme=QuantizationScheme(scheme), qformulation=formulation
    )


def _dropout(x: Tensor, p: float, kind: str) -> Tensor:
    """A dropout in evaluation: rate and kind survive capture, which turns it into a copy."""
    return x.clone()


def _fake_like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _fake_lut(
    indices: Tensor,
    lut: Tensor,
    n_bits: int,
    shape: Sequence[int],
    vector_axis: int | None = None,
) -> Tensor:
    index_shape = _index_shape(lut, shape, vector_axis)
    needed = packed_size(math.prod(index_shape), n_bits)
    torch._check(lut.shape[-2] == 2**n_bits, lambda: f"a table has {lut.shape[-2]} entries")
    torch._check(indices.numel() == needed, lambda: f"{indices.numel()} bytes, not {needed}")
    return lut.new_empty(list(shape))


def _fake_shift_scale(
    data: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    storage: str,
    shape: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    return data.new_empty(list(shape), dtype=out_dtype)


def _fake_sparse(values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    return values.new_empty(list(shape))


# CompositeExplicitAutograd: an implicit composite would be inlined by run_decompositions
for _name, _eager, _fake in (
    ("lut_to_dense", lut_to_dense, _fake_lut),
    ("shift_scale", shift_scale, _fake_shift_scale),
    ("sparse_to_dense", sparse_to_dense, _fake_sparse),
    ("round_to_float", round_to_float, _fake_like),
    ("round_by_range", round_by_range, _fake_like),
    ("dropout", _dropout, _fake_like),
):
    _library.impl(_name, _eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_library)
