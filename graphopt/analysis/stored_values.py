"""Compressed weights that a converted graph holds, for refusals, reports, counts and sizes.

They are told by the op of the vocabulary that gives them, whatever scheme they come from: a lookup,
a dequantize op, or a mask with values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, fx

from graphopt.analysis.weights import is_with_outliers
from graphopt.ir.captured_module import holder_of
from graphopt.ir.ops import STORAGE_BITS
from graphopt.specs.dtypes import bits_of, parse_dtype
from graphopt.specs.storage import Codes

__all__ = [
    "Lookup",
    "QuantizedTensor",
    "SparseTensor",
    "StoredValue",
    "find_lookups",
    "find_quantized_weights",
    "find_sparse",
    "quantized_at",
    "stored_values",
]

ValueT = TypeVar("ValueT", bound="StoredValue")
_ours = torch.ops.graphopt
_DEQUANTIZE = "quantized_decomposed.dequantize_per_"


@dataclass(frozen=True)
class StoredValue:
    """One compressed weight of a graph.

    Attributes:
        name: Name of the weight, from its first constant.
        node: The op that makes it of its constants.
        shape: Shape of the dense weight.
    """

    name: str
    node: fx.Node
    shape: tuple[int, ...]

    @property
    def dense(self) -> fx.Node:
        """The node that gives the dense weight."""
        return self.node

    @property
    def label(self) -> str:
        """What it is stored as, in a word or two."""
        return "sparse"

    @property
    def nested(self) -> bool:
        """Whether it is a part of what another op stores, counted there."""
        return False

    @property
    def codes(self) -> Codes | None:
        """Its packed elements; None without any."""
        return None

    @property
    def entry_node(self) -> fx.Node | None:
        """A node that holds no values but those of tables, scaled where a scale follows; None without."""
        return None


@dataclass(frozen=True)
class Lookup(StoredValue):
    """One palettized weight of a graph.

    Attributes:
        name: Name of the weight, from its indices' buffer.
        node: The lookup op.
        shape: Shape of the dense weight.
        n_bits: Bits per index.
        tables: Tables along each axis.
        entries: Length of a table entry.
        lut_dtype: Element type of the stored tables.
        channel_scale: Whether a scale follows the lookup.
        last: The node that gives the dense weight: the lookup, its scale, or what adds outliers.
    """

    n_bits: int
    tables: tuple[int, ...]
    entries: int
    lut_dtype: str
    channel_scale: bool
    last: fx.Node

    @property
    def dense(self) -> fx.Node:
        """The node that gives the dense weight."""
        return self.last

    @property
    def label(self) -> str:
        """Such as "4-bit table"."""
        return f"{self.n_bits}-bit table"

    @property
    def entry_node(self) -> fx.Node:
        """The tables, or the dense weight where they are scaled by channel."""
        return self.dense if self.channel_scale else cast("fx.Node", self.node.args[1])

    @property
    def outliers(self) -> bool:
        """Whether outliers are added."""
        return is_with_outliers(self.dense)

    @property
    def grouped(self) -> bool:
        """Whether there is more than one table."""
        return math.prod(self.tables) > 1

    @property
    def codes(self) -> Codes:
        """One index per entry's length of elements."""
        slot = self.entries * bits_of(parse_dtype(self.lut_dtype))
        count = math.prod(self.shape) // self.entries
        return Codes(count, self.n_bits, tables=math.prod(self.tables), slot_bits=slot)


@dataclass(frozen=True)
class QuantizedTensor(StoredValue):
    """A weight that a dequantize op produces.

    Attributes:
        name: Name of the weight.
        node: The dequantize op.
        shape: Shape of the weight.
        data: Node of the stored elements.
        storage: Element type, as in `graphopt.ops.shift_scale`.
        counts: Blocks along each axis.
        scale_dtype: Type of the scales.
        offset: "none", "zero_point" or "minimum".
    """

    data: fx.Node
    storage: str
    counts: tuple[int, ...]
    scale_dtype: torch.dtype
    offset: str

    @property
    def label(self) -> str:
        """Element type."""
        return self.storage

    @property
    def per_channel(self) -> bool:
        """Whether there is one scale, or one per index of a single axis."""
        several = [(c, s) for c, s in zip(self.counts, self.shape, strict=True) if c > 1]
        return not several or (len(several) == 1 and several[0][0] == several[0][1])

    @property
    def codes(self) -> Codes:
        """One element of the type per element of the weight."""
        width = 8 * self.data.meta["val"].element_size()
        return Codes(math.prod(self.shape), STORAGE_BITS.get(self.storage, width), self.storage)


@dataclass(frozen=True)
class SparseTensor(StoredValue):
    """A weight whose values a mask puts into place; outliers beside tables are none.

    Attributes:
        name: Name of the weight, from its mask's buffer.
        node: The op that scatters the values.
        shape: Shape of the dense weight.
        plain: Whether its values are stored as they are, not compressed themselves.
    """

    plain: bool

    @property
    def nested(self) -> bool:
        """Whether its values are compressed, and counted as that."""
        return not self.plain


def stored_values(gm: fx.GraphModule) -> list[StoredValue]:
    """All compressed weights of a graph in our vocabulary, in order.

    Tables of lookups and outliers beside tables belong to their lookups. The values of a pruned
    weight come before the weight.
    """
    return list(_walk(gm))


def find_lookups(gm: fx.GraphModule) -> list[Lookup]:
    """Those of `stored_values` that are lookups."""
    return _of_kind(gm, Lookup)


def find_quantized_weights(gm: fx.GraphModule) -> list[QuantizedTensor]:
    """Those of `stored_values` that are dequantized constants."""
    return _of_kind(gm, QuantizedTensor)


def find_sparse(gm: fx.GraphModule) -> list[SparseTensor]:
    """Those of `stored_values` that have a mask."""
    return _of_kind(gm, SparseTensor)


def _of_kind(gm: fx.GraphModule, kind: type[ValueT]) -> list[ValueT]:
    return [value for value in _walk(gm) if isinstance(value, kind)]


def _walk(gm: fx.GraphModule) -> Iterator[StoredValue]:
    for node in gm.graph.nodes:
        if node.op != "call_function" or not node.args:
            continue
        if node.target is _ours.lut_to_dense.default:
            yield _lookup(gm, node)
        elif node.target is _ours.sparse_to_dense.default:
            if not any(is_with_outliers(user) and user.args[1] is node for user in node.users):
                yield _sparse(node)
        else:
            quantized = quantized_at(node)
            if quantized is not None:
                yield quantized


def _lookup(gm: fx.GraphModule, node: fx.Node) -> Lookup:
    indices, lut, n_bits, size = node.args[:4]
    assert isinstance(indices, fx.Node)
    assert isinstance(lut, fx.Node)
    value = lut.meta.get("val")
    if not isinstance(value, Tensor):
        value = _tensor(gm, lut)
    quantized = lut.target is _ours.shift_scale.default
    dtype = str(lut.args[3]) if quantized else str(value.dtype).removeprefix("torch.")
    dense, scaled = node, False
    if len(node.users) == 1 and next(iter(node.users)).target is _ours.shift_scale.default:
        dense, scaled = next(iter(node.users)), True
    if len(dense.users) == 1 and is_with_outliers(next(iter(dense.users))):
        dense = next(iter(dense.users))
    return Lookup(
        str(indices.target).removesuffix("_indices"),
        node,
        _sizes(size),
        int(n_bits),  # type: ignore[arg-type]
        _sizes(value.shape[:-2]),
        int(value.shape[-1]),
        dtype,
        scaled,
        dense,
    )


def quantized_at(node: fx.Node) -> QuantizedTensor | None:
    """The weight that a call gives, if it dequantizes a constant."""
    data, target = node.args[0], str(node.target)
    if not isinstance(data, fx.Node) or data.op != "get_attr":
        return None
    name = str(data.target)
    for suffix in ("_quantized", "_data"):
        name = name.removesuffix(suffix)
    if node.target is _ours.shift_scale.default:
        if any(user.target is _ours.lut_to_dense.default for user in node.users):
            return None
        scale, offset, storage, shape = node.args[1:5]
        scales = scale.meta["val"]  # type: ignore[union-attr]
        kind = "none" if offset is None else "zero_point"
        if isinstance(offset, fx.Node) and offset.meta["val"].is_floating_point():
            kind = "minimum"
        counts, dtype = _sizes(scales.shape), scales.dtype
        return QuantizedTensor(name, node, _sizes(shape), data, str(storage), counts, dtype, kind)
    if not target.startswith(_DEQUANTIZE):
        return None
    value = data.meta["val"]
    storage = str(value.dtype).removeprefix("torch.")
    shape, counts, dtype = _sizes(value.shape), (1,) * value.ndim, torch.float32
    if target == f"{_DEQUANTIZE}channel.default":
        counts = tuple(n if axis == node.args[3] else 1 for axis, n in enumerate(shape))
        dtype = node.args[1].meta["val"].dtype  # type: ignore[union-attr]
    elif target != f"{_DEQUANTIZE}tensor.default":
        return None
    return QuantizedTensor(name, node, shape, data, storage, counts, dtype, "zero_point")


def _sparse(node: fx.Node) -> SparseTensor:
    values, mask, shape = node.args[:3]
    name = str(getattr(mask, "target", mask)).removesuffix("_mask")
    plain = isinstance(values, fx.Node) and values.op == "get_attr"
    return SparseTensor(name, node, _sizes(shape), plain)


def _sizes(values: object) -> tuple[int, ...]:
    return tuple(int(size) for size in values)  # type: ignore[attr-defined]


def _tensor(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    if node.op == "get_attr":
        holder, name = holder_of(gm, str(node.target))
        value = getattr(holder, name)
        assert isinstance(value, Tensor)
        return value
    return torch.empty(_sizes(node.args[4]), device="meta")
