"""Decode lookups with ops that every ExecuTorch runtime has, so that a .pte stays small."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.analysis.stored_values import Lookup, find_lookups
from graphopt.backends.executorch.kernels import EMBEDDINGS, LINEAR
from graphopt.backends.executorch.weight_forms import bias_apart
from graphopt.ir import op_info
from graphopt.ir.editor import Editor, operands
from graphopt.numerics.packing import pack, unpack
from graphopt.passes.expand_tables import drop_unread
from graphopt.passes.pass_base import Pass
from graphopt.run.interpreter import constant_value

__all__ = ["BYTE", "DECODED", "TABLE_SHARE", "CompressTables"]

_aten = torch.ops.aten
_ops = torch.ops.graphopt
DECODED = "codes decoded at every call"  # how its notes end
BYTE = 256  # rows of a table that bytes of codes look up
# widths as sums of those that fill a byte
_PLANES = {1: (1,), 2: (2,), 3: (1, 2), 4: (4,), 6: (2, 4), 8: (8,)}
# tables of whole bytes may add this share of the codes' own bytes
TABLE_SHARE = 0.25


@dataclass(frozen=True)
class CompressTables(Pass):
    """Replace each lookup by `embedding` ops over bytes of packed indices.

    Before:
        %w = graphopt.lut_to_dense(%indices, %lut, 4, shape)

    After:
        %i = _to_copy(%w_codes, dtype=int32)
        %e = embedding(%w_table, %i)          # [256, 2]: both codes of a byte at once
        %w = view(%e, shape)

    A table of all 256 bytes lists the values of the codes that each byte holds. Where many tables
    would make that larger than a quarter of the codes, bytes are first turned into codes by a table
    that all layers share; 3- and 6-bit codes are split into planes of 1, 2 and 4 bits for that. An
    embedding layer decodes the rows it reads, other layers their whole weight at every call. What
    has outliers or a float minimum behind the lookup is stored densely.

    Attributes:
        rows_only: Only take weights that embedding layers alone read, and leave all others.
    """

    name: ClassVar[str] = "compress-tables"
    rows_only: bool = False

    @override
    def run(self, edit: Editor) -> None:
        shared: dict[tuple[int, int], fx.Node] = {}
        for lookup in find_lookups(edit.gm):
            node = lookup.dense
            reason = _refusal(edit, lookup)
            made: fx.Node | None
            if self.rows_only and (reason or not _Decoder(edit, lookup, shared).reads_rows()):
                continue
            if reason:
                dense = constant_value(edit.gm, node)
                made = edit.constant(f"{lookup.name}_dense", dense, like=node)
                note = (
                    f"{lookup.name}: {lookup.n_bits}-bit table stored as a dense weight ({reason})"
                )
            else:
                made = _Decoder(edit, lookup, shared).emit()
                note = f"{lookup.name}: {lookup.n_bits}-bit codes decoded at every call"
            edit.note(note)
            read = operands(node)
            if made is None:  # every reader has its own decoder
                edit.erase(node)
            else:
                edit.replace(node, made)
                for reader in list(made.users):
                    if reader.target in LINEAR:
                        bias_apart(edit, reader)
            drop_unread(edit, read)


def _refusal(edit: Editor, lookup: Lookup) -> str:
    if lookup.outliers:
        return "it has outliers"
    if any(_is_recurrent(reader) for reader in lookup.dense.users):
        # they become linear layers with biases after these passes
        return "a recurrent layer reads it"
    if lookup.channel_scale:
        offset = _offset_of(lookup)
        if offset is not None and edit.value(offset).is_floating_point():
            return "its elements have a float minimum"
    return ""


def _offset_of(lookup: Lookup) -> fx.Node | None:
    """The zero points behind a lookup."""
    offset = lookup.dense.args[2] if len(lookup.dense.args) > 2 else None
    return offset if isinstance(offset, fx.Node) else None


def _is_recurrent(node: fx.Node) -> bool:
    info = op_info.info_of(node)
    return info is not None and info.weight_list is not None


class _Decoder:
    """Emits the ops that decode one weight.

    Codes are stored group after group; within a group in the order of the weight.
    """

    def __init__(
        self, edit: Editor, lookup: Lookup, shared: dict[tuple[int, int], fx.Node]
    ) -> None:
        self.edit, self.lookup, self.shared = edit, lookup, shared
        self.bits, self.entries = lookup.n_bits, lookup.entries
        node = lookup.node
        self.axis = int(node.args[4]) if len(node.args) > 4 else 0  # type: ignore[arg-type]
        self.sizes = [  # of the codes, along each axis
            size // self.entries if axis == self.axis and self.entries > 1 else size
            for axis, size in enumerate(lookup.shape)
        ]
        self.groups = math.prod(lookup.tables)
        count = math.prod(self.sizes)
        codes = unpack(edit.value(node.args[0]), self.bits, count)  # type: ignore[arg-type]
        self.codes = self._by_group(codes.reshape(self.sizes)).reshape(self.groups, -1)
        table = constant_value(edit.gm, node.args[1])  # type: ignore[arg-type]
        self.table = table.reshape(self.groups, 2**self.bits, self.entries).to(
            lookup.dense.meta["val"].dtype
        )

    def _by_group(self, codes: Tensor) -> Tensor:
        split = [
            part
            for size, tables in zip(self.sizes, self.lookup.tables, strict=True)
            for part in (tables, size // tables)
        ]
        rank = len(self.sizes)
        order = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]
        return codes.reshape(split).permute(order).contiguous()

    def emit(self) -> fx.Node | None:
        """The node of the dense weight, or None where every reader decodes its own rows."""
        if self.reads_rows():
            readers = list(self.lookup.dense.users)
            for reader in readers:
                self.edit.replace(reader, self._rows(reader))
            return None
        return self._scaled(self._whole())

    def reads_rows(self) -> bool:
        """Whether embedding layers alone read the weight, and its rows can be decoded one by one."""
        return self._by_rows() and all(
            reader.target in EMBEDDINGS and reader.args[0] is self.lookup.dense
            for reader in self.lookup.dense.users
        )

    # --- the whole weight ---------------------------------------------------------------------------
    def _whole(self) -> fx.Node:
        values = self._direct() if self._is_direct() else self._staged()
        edit, like = self.edit, self.lookup.dense
        tables, shape = self.lookup.tables, list(self.lookup.shape)
        if self.entries == 1 and all(count == 1 for count in tables[1:]):
            return edit.call(_aten.view.default, values, shape, like=like)
        rank = len(shape)
        counts = [size // count for size, count in zip(self.sizes, tables, strict=True)]
        order = []
        for axis in range(rank):
            order += [axis, rank + axis]
            if axis == self.axis:
                order.append(2 * rank)
        split, order = _merged([*tables, *counts, self.entries], order)
        dense = edit.call(_aten.view.default, values, split, like=like)
        if order != sorted(order):
            moved = edit.call(_aten.permute.default, dense, order, like=like)
            dense = edit.call(
                _aten.clone.default, moved, like=like, memory_format=torch.contiguous_format
            )
        return edit.call(_aten.view.default, dense, shape, like=like)

    def _is_direct(self) -> bool:
        if len(_PLANES[self.bits]) > 1:
            return False
        per_byte = 8 // self.bits
        table_bytes = self.groups * BYTE * per_byte * self.entries * self.table.element_size()
        return table_bytes <= TABLE_SHARE * self.codes.numel() * self.bits / 8

    def _direct(self) -> fx.Node:
        """Bytes to values in one step, [groups, codes, entries]."""
        per_byte = 8 // self.bits
        listed = _codes_of_bytes(self.bits).to(torch.long)
        rows = self.table[:, listed].reshape(self.groups * BYTE, per_byte * self.entries)
        table = self._constant("table", rows.contiguous())
        index = self._bytes(self.bits, self.codes, "codes")
        if self.groups > 1:
            index = self._offset(index, BYTE)
        return self._decoded(table, index, per_byte, self.entries)

    def _staged(self) -> fx.Node:
        """Bytes to codes, plane by plane, then codes to values."""
        edit, like, shift, code = self.edit, self.lookup.dense, 0, None
        for plane, bits in enumerate(_PLANES[self.bits]):
            part = (self.codes >> shift) & (2**bits - 1)
            index = self._bytes(bits, part, f"codes{plane}")
            table = self._shared_table(bits, 2**shift)
            part_code = self._decoded(table, index, 8 // bits, 1)
            code = (
                part_code
                if code is None
                else edit.call(_aten.add.Tensor, code, part_code, like=like)
            )
            shift += bits
        assert code is not None
        index = edit.call(_aten._to_copy.default, code, dtype=torch.int32, like=like)
        if self.groups > 1:
            index = self._offset(index, 2**self.bits)
        rows = self.table.reshape(self.groups * 2**self.bits, self.entries).contiguous()
        return edit.call(_aten.embedding.default, self._constant("table", rows), index, like=like)

    def _bytes(self, bits: int, codes: Tensor, name: str) -> fx.Node:
        """Packed codes, every group in whole bytes, as int32 indices [groups, bytes]."""
        filled = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (8 // bits)))
        packed = pack(filled, bits).reshape(self.groups, -1)
        stored = self._constant(name, packed)
        like = self.lookup.dense
        return self.edit.call(_aten._to_copy.default, stored, dtype=torch.int32, like=like)

    def _offset(self, index: fx.Node, step: int) -> fx.Node:
        first = (torch.arange(self.groups, dtype=torch.int32) * step)[:, None]
        offsets = self._constant("offsets", first)
        return self.edit.call(_aten.add.Tensor, index, offsets, like=self.lookup.dense)

    def _decoded(self, table: fx.Node, index: fx.Node, per_byte: int, entries: int) -> fx.Node:
        """Look bytes up and drop the codes that only fill the last byte of a group."""
        edit, like = self.edit, self.lookup.dense
        rows = edit.call(_aten.embedding.default, table, index, like=like)
        count = self.codes.shape[1] * entries
        held = index.meta["val"].shape[1] * per_byte * entries
        flat = edit.call(_aten.view.default, rows, [self.groups, held], like=like)
        if held != count:
            flat = edit.call(_aten.slice.Tensor, flat, 1, 0, count, like=like)
        return flat

    def _shared_table(self, bits: int, step: int) -> fx.Node:
        key = (bits, step)
        known = self.shared.get(key)
        if known is None:
            values = _codes_of_bytes(bits) * step
            known = self.edit.constant(
                f"codes_of_bytes_{bits}_{step}", values.contiguous(), like=self.lookup.dense
            )
            self.shared[key] = known
        return known

    def _constant(self, name: str, value: Tensor) -> fx.Node:
        return self.edit.constant(
            f"{self.lookup.name}_{name}", value.contiguous(), like=self.lookup.dense
        )

    def _scaled(self, dense: fx.Node) -> fx.Node:
        if not self.lookup.channel_scale:
            return dense
        edit, lookup = self.edit, self.lookup
        scale = edit.value(lookup.dense.args[1])  # type: ignore[arg-type]
        # an axis is split where its scales are of blocks
        split = [
            part
            for count, size in zip(scale.shape, lookup.shape, strict=True)
            for part in ([size] if count in (1, size) else [count, size // count])
        ]
        counts = [
            part
            for count, size in zip(scale.shape, lookup.shape, strict=True)
            for part in ([count] if count in (1, size) else [count, 1])
        ]
        blocks = len(split) > len(lookup.shape)
        if blocks:
            dense = edit.call(_aten.view.default, dense, split, like=lookup.dense)
        offset = _offset_of(lookup)
        if offset is not None:
            zero = edit.value(offset).expand(scale.shape).reshape(counts)
            points = self._constant("zero_points", zero.to(self.table.dtype))
            dense = edit.call(_aten.sub.Tensor, dense, points, like=lookup.dense)
        factors = self._constant("factors", scale.to(self.table.dtype).reshape(counts))
        dense = edit.call(_aten.mul.Tensor, dense, factors, like=lookup.dense)
        if not blocks:
            return dense
        return edit.call(_aten.view.default, dense, list(lookup.shape), like=lookup.dense)

    # --- rows of an embedding -----------------------------------------------------------------------
    def _by_rows(self) -> bool:
        """Whether rows are whole bytes of codes with one table each."""
        lookup = self.lookup
        one_plane = len(_PLANES[self.bits]) == 1
        rows = len(lookup.shape) == 2 and lookup.tables[1] == 1 and self.entries == 1
        whole = rows and lookup.shape[1] * self.bits % 8 == 0
        return one_plane and whole and not lookup.channel_scale

    def _rows(self, reader: fx.Node) -> fx.Node:
        edit, ids = self.edit, reader.args[1]
        rows, width = self.lookup.shape
        per_byte = 8 // self.bits

        def call(target: object, *args: object, **kwargs: object) -> fx.Node:
            return edit.call(target, *args, like=reader, **kwargs)  # type: ignore[arg-type]

        stored = pack(self.codes.reshape(rows, width), self.bits).reshape(rows, -1)
        packed = call(_aten.embedding.default, self._constant("codes", stored), ids)
        index = call(_aten._to_copy.default, packed, dtype=torch.int32)
        if not self._is_direct():
            codes = call(_aten.embedding.default, self._shared_table(self.bits, 1), index)
            flat = call(_aten.flatten.using_ints, codes, -2, -1)
            index = self._row_offset(
                call(_aten._to_copy.default, flat, dtype=torch.int32), 2**self.bits, call, ids
            )
            table = self._constant("table", self.table.reshape(-1, 1))
            return call(_aten.squeeze.dim, call(_aten.embedding.default, table, index), -1)
        listed = _codes_of_bytes(self.bits).to(torch.long)
        values = self.table[:, listed].reshape(self.groups * BYTE, per_byte)
        index = self._row_offset(index, BYTE, call, ids)
        decoded = call(_aten.embedding.default, self._constant("table", values), index)
        return call(_aten.flatten.using_ints, decoded, -2, -1)

    def _row_offset(self, index: fx.Node, step: int, call: Any, ids: Any) -> fx.Node:
        if self.groups == 1:
            return index
        rows = self.lookup.shape[0]
        first = torch.arange(rows, dtype=torch.int32) // (rows // self.groups) * step
        offsets = self._constant("offsets", first[:, None])
        made: fx.Node = call(_aten.add.Tensor, index, call(_aten.embedding.default, offsets, ids))
        return made


def _merged(sizes: list[int], order: list[int]) -> tuple[list[int], list[int]]:
    """The same permutation over as few dimensions as do: XNNPACK permutes no more than six."""
    order = [axis for axis in order if sizes[axis] > 1]
    runs: list[list[int]] = []
    kept = [axis for axis in range(len(sizes)) if sizes[axis] > 1]
    for axis in order:
        place = kept.index(axis)
        if runs and place and runs[-1][-1] == kept[place - 1]:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    stored = sorted(runs)
    return (
        [math.prod(sizes[axis] for axis in run) for run in stored],
        [stored.index(run) for run in runs],
    )


def _codes_of_bytes(bits: int) -> Tensor:
    """The codes that each byte holds, [256, 8 / bits], uint8."""
    shifts = torch.arange(0, 8, bits)
    return ((torch.arange(BYTE)[:, None] >> shifts) & (2**bits - 1)).to(torch.uint8)
