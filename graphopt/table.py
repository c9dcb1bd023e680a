"""The table that every compressor returns: one row per candidate tensor, done or not and why."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

__all__ = ["CompressionTable", "TensorRecord"]


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """What happened to one tensor.

    Attributes:
        name: Dotted name of the parameter or buffer.
        aliases: Other names of the same (tied) tensor.
        module_type: Class of the module whose op uses it.
        ops: Types of the ops that use it, as configs name them.
        nodes: Graph nodes of those ops.
        shape: Its shape.
        dtype: Its element type before compression.
        status: Whether it was palettized or left alone.
        detail: How it was compressed, or why not.
        note: A fallback that was taken, or "".
        n_bits: Bits per index, None where it is left alone.
        n_luts: Number of tables.
        stored_bits: Bits that its stored form takes.
        snr_db: 10·log10(Σw² / Σ(w − ŵ)²), None where it is left alone.
    """

    name: str
    aliases: tuple[str, ...] = ()
    module_type: str = ""
    ops: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: str = ""
    status: Literal["palettized", "skipped"]
    detail: str = ""
    note: str = ""
    n_bits: int | None = None
    n_luts: int | None = None
    stored_bits: int = 0
    snr_db: float | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, tables and scales included."""
        return self.stored_bits / max(self.numel, 1)


@dataclass(frozen=True)
class CompressionTable:
    """Rows of `TensorRecord` with totals; prints as a table.

    Attributes:
        rows: One per candidate tensor, in the order of the graph.
        warnings: Config keys that had no effect, and other remarks on the whole model.
    """

    rows: tuple[TensorRecord, ...]
    warnings: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[TensorRecord]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> TensorRecord:
        for row in self.rows:
            if name == row.name or name in row.aliases:
                return row
        raise KeyError(name)

    @property
    def palettized(self) -> tuple[TensorRecord, ...]:
        """Rows of tensors that were compressed."""
        return tuple(row for row in self.rows if row.status == "palettized")

    @property
    def skipped(self) -> tuple[TensorRecord, ...]:
        """Rows of tensors that were left alone."""
        return tuple(row for row in self.rows if row.status == "skipped")

    @property
    def stored_bytes(self) -> int:
        """Bytes of all listed tensors in their stored form."""
        return sum(-(-row.stored_bits // 8) for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element over the compressed rows."""
        done = self.palettized
        return sum(row.stored_bits for row in done) / max(sum(row.numel for row in done), 1)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Rows as plain values."""
        return [
            {**asdict(row), "numel": row.numel, "bits_per_weight": row.bits_per_weight}
            for row in self.rows
        ]

    def __rich__(self) -> Table:
        table = Table(title=f"{len(self.palettized)} of {len(self.rows)} tensors palettized")
        for heading in (
            "tensor",
            "op",
            "shape",
            "bits/weight",
            "KiB",
            "SNR dB",
            "what, or why not",
        ):
            right = heading in ("bits/weight", "KiB", "SNR dB")
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        for row in self.rows:
            snr = "" if row.snr_db is None else f"{row.snr_db:.1f}"
            about = f"{row.detail}; {row.note}" if row.note else row.detail
            if row.aliases:
                about += f"; tied with {', '.join(row.aliases)}"
            size = f"{row.stored_bits / 8192:.2f}"
            shape = "×".join(map(str, row.shape))
            bits = f"{row.bits_per_weight:.3f}"
            table.add_row(row.name, ", ".join(row.ops), shape, bits, size, snr, about)
        for warning in self.warnings:
            table.add_row("", "", "", "", "", "", warning)
        return table

    def __str__(self) -> str:
        stream = io.StringIO()
        Console(file=stream, width=140, no_color=True).print(self)
        return stream.getvalue()


def merged(first: CompressionTable, second: CompressionTable) -> CompressionTable:
    """Rows of both, the second's replacing the first's of the same tensor."""
    replaced = {row.name for row in second.rows}
    kept: Sequence[TensorRecord] = [row for row in first.rows if row.name not in replaced]
    return CompressionTable((*kept, *second.rows), (*first.warnings, *second.warnings))
