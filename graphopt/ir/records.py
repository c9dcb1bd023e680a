"""The table that every compressor returns: one row per candidate tensor, done or not and why."""

from __future__ import annotations

import importlib
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from graphopt.errors import StateError

__all__ = ["ActivationRecord", "CompressionTable", "TensorRecord", "finite_values", "merged"]


_PARTS = (
    "_indices",
    "_quantized",
    "_values",
    "_data",
)  # what a compressed weight's first part is called


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
        status: Whether it was palettized, quantized, only pruned, or left alone.
        detail: How it was compressed, or why not.
        note: A fallback that was taken, or "".
        n_bits: Bits per index or element, None where it is left alone.
        n_luts: Number of tables, None where there are none.
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
    status: Literal["palettized", "quantized", "pruned", "skipped"]
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


@dataclass(frozen=True, kw_only=True)
class ActivationRecord:
    """What happened to the activations of one scale, or to an op that stays in float.

    Attributes:
        name: Name of the sharing group (its first value), or of the op.
        nodes: Values with this scale.
        status: Whether they are quantized.
        detail: Element type and scheme, or why not.
        path: Config path that decided.
        scale: The scale, None before calibration or where there are several.
        offset: Zero point, or fractional offset (MINVAL).
        low: Lower end of the observed range.
        high: Upper end.
        seen: Tensors that were observed.
    """

    name: str
    nodes: tuple[str, ...] = ()
    status: Literal["quantized", "float"]
    detail: str = ""
    path: str = ""
    scale: float | None = None
    offset: float | None = None
    low: float | None = None
    high: float | None = None
    seen: int = 0


@dataclass(frozen=True)
class CompressionTable:
    """Rows of `TensorRecord` with totals; prints as a table.

    Attributes:
        rows: One per candidate tensor, in the order of the graph.
        warnings: Config keys that had no effect, and other remarks on the whole model.
        activations: One per scale of activations, and per op that stays in float.
        program: The program that this reports on, where it is one's report.
    """

    rows: tuple[TensorRecord, ...]
    warnings: tuple[str, ...] = ()
    activations: tuple[ActivationRecord, ...] = ()
    program: Any = field(default=None, compare=False, repr=False)

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
        """Rows of weights that became tables."""
        return tuple(row for row in self.rows if row.status == "palettized")

    @property
    def quantized(self) -> tuple[TensorRecord, ...]:
        """Rows of weights that were quantized."""
        return tuple(row for row in self.rows if row.status == "quantized")

    @property
    def pruned(self) -> tuple[TensorRecord, ...]:
        """Rows of weights that only got zeros."""
        return tuple(row for row in self.rows if row.status == "pruned")

    @property
    def compressed(self) -> tuple[TensorRecord, ...]:
        """Rows of tensors that are stored in fewer bits."""
        return tuple(row for row in self.rows if row.status != "skipped")

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
        done = self.compressed
        return sum(row.stored_bits for row in done) / max(sum(row.numel for row in done), 1)

    def to_json(self) -> str:
        """Rows, activations and remarks as one JSON object."""
        plain = {
            "bits_per_weight": self.bits_per_weight,
            "stored_bytes": self.stored_bytes,
            "tensors": self.to_dicts(),
            "activations": [asdict(record) for record in self.activations],
            "warnings": list(self.warnings),
        }
        # JSON has no infinity
        return json.dumps(finite_values(plain), indent=2, default=str)

    def to_html(self, path: str | Path, **options: Any) -> Path:
        """Write a self-contained page about the program that this is the report of.

        Args:
            path: An .html file.
            options: `before`, `data`, `sensitivities`, `curve`, `title`, `overwrite`, as for
                `graphopt.inspection.write_page`.

        Raises:
            StateError: The table is no program's report.
        """
        if self.program is None:
            raise StateError("call to_html() on program.report(); a table alone has no weights")
        # what draws stands above this; it is imported by name as backends are
        page = importlib.import_module("graphopt.report.page")
        written: Path = page.write_page(self.program, path, **options)
        return written

    def to_dicts(self) -> list[dict[str, Any]]:
        """Rows as plain values."""
        return [
            {**asdict(row), "numel": row.numel, "bits_per_weight": row.bits_per_weight}
            for row in self.rows
        ]

    def _title(self) -> str:
        done = [
            (len(self.palettized), "palettized"),
            (len(self.quantized), "quantized"),
            (len(self.pruned), "pruned"),
        ]
        parts = [f"{count} {verb}" for count, verb in done if count]
        if len(parts) > 1:
            title = f"{' and '.join(parts)} of {len(self.rows)} tensors"
        else:
            count, verb = next(((c, v) for c, v in done if c), (0, "compressed"))
            title = f"{count} of {len(self.rows)} tensors {verb}"
        scales = sum(record.status == "quantized" for record in self.activations)
        return f"{title}, {scales} activation scales" if scales else title

    def activation_table(self) -> Table:
        """The activations, for printing."""
        table = Table(title="activations")
        for heading in ("values", "type", "range", "scale", "offset", "seen", "decided by"):
            table.add_column(heading, overflow="fold")
        for record in self.activations:
            if record.status == "float":
                table.add_row(record.name, "float", "", "", "", "", record.detail)
                continue
            known = record.low is not None and record.high is not None
            reach = f"[{record.low:.4g}, {record.high:.4g}]" if known else ""
            scale = "" if record.scale is None else f"{record.scale:.4g}"
            offset = "" if record.offset is None else f"{record.offset:g}"
            values = ", ".join(record.nodes)
            table.add_row(
                values, record.detail, reach, scale, offset, str(record.seen), record.path
            )
        return table

    def __rich__(self) -> Table:
        table = Table(title=self._title())
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
    """Rows of both, the second's replacing the first's of the same tensor.

    Of a weight that the first compressed the second knows only a part, which it leaves: the first's
    row says so.
    """
    done = {row.name for row in first.compressed}
    added, left = [], {}
    for row in second.rows:
        parts = [part for part in _PARTS if row.name.endswith(part)]
        whole = row.name.removesuffix(parts[0]) if parts else ""
        if row.status == "skipped" and whole in done:
            left[whole] = row.detail
        else:
            added.append(row)
    replaced = {row.name for row in added}
    kept = [
        replace(row, note=left[row.name]) if row.name in left and not row.note else row
        for row in first.rows
        if row.name not in replaced
    ]
    return CompressionTable(
        (*kept, *added),
        (*first.warnings, *second.warnings),
        (*first.activations, *second.activations),
    )


def finite_values(value: Any) -> Any:
    """Plain values with None for infinite ones, which JSON has not."""
    if isinstance(value, dict):
        return {key: finite_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite_values(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
