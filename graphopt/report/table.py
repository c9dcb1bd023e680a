"""CompressionTable: the record of what was done, for printing and as a page."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import nn
from torch.export import ExportedProgram
from typing_extensions import Unpack, override

from graphopt.errors import StateError
from graphopt.ir.annotations import record_of
from graphopt.ir.program import Program
from graphopt.ir.records import CompressionRecord
from graphopt.report.bits import stored_tensors
from graphopt.report.notebook import ShownAsTable
from graphopt.report.page import PageKeywords, write_page

__all__ = ["CompressionTable", "table_of"]

_WIDE = 110
_LEFT_OUT = ("op", "shape")  # where a line has fewer characters than that
_NUMBERS = ("bits/weight", "KiB", "SNR dB")


@dataclass(frozen=True)
class CompressionTable(CompressionRecord, ShownAsTable):
    """What every compressor returns; prints as a table.

    Attributes:
        program: The program that this reports on, where it is one's report.

    Examples:
        >>> table = graphopt.compress(model, example, {"palettization": {}}).report()
        >>> [row.name for row in table]
        ['0.weight', '2.weight']
    """

    program: Program | None = field(default=None, compare=False, repr=False)
    _width: ClassVar[int] = 140

    __repr__ = CompressionRecord.__repr__

    def to_html(
        self,
        path: str | Path,
        *,
        before: nn.Module | ExportedProgram | Program | None = None,
        data: Iterable[Any] | None = None,
        **options: Unpack[PageKeywords],
    ) -> Path:
        """Write a self-contained page about the program that this is the report of.

        Args:
            path: An .html file.
            before: The model, for sizes and errors of each layer.
            data: Inputs of one call each, for errors of outputs; needs `before`.
            options: As for `graphopt.inspection.write_page`.

        Raises:
            StateError: The table is no program's report.
        """
        if self.program is None:
            raise StateError("call to_html() on program.report(); a table alone has no weights")
        return write_page(self.program, path, before=before, data=data, **options)

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
        title += f", {scales} activation scales" if scales else ""
        if not self.compressed:
            return title
        overall = f"{self.overall_bits_per_weight:.3f} bits per weight"
        return f"{title}; {overall}, {self.bits_per_weight:.3f} over the compressed"

    def activation_table(self) -> Table:
        """The activations, for printing."""
        table = Table(title="activations")
        for heading in ("values", "type", "range", "scale", "offset", "seen", "why", "decided by"):
            table.add_column(heading, overflow="fold")
        for record in self.activations:
            if record.status == "float":
                table.add_row(record.name, "float", "", "", "", "", record.detail, record.path)
                continue
            known = record.low is not None and record.high is not None
            reach = f"[{record.low:.4g}, {record.high:.4g}]" if known else ""
            scale = "" if record.scale is None else f"{record.scale:.4g}"
            offset = "" if record.offset is None else f"{record.offset:g}"
            values = ", ".join(record.nodes)
            about = (record.detail, reach, scale, offset, str(record.seen))
            table.add_row(values, *about, record.why, record.path)
        return table

    def __rich__(self) -> Table:
        table = _Fitting(title=self._title())
        for heading in ("tensor", *_LEFT_OUT, *_NUMBERS, "what, or why not"):
            right = heading in _NUMBERS
            side: Literal["left", "right"] = "right" if right else "left"
            table.add_column(heading, justify=side, no_wrap=right, overflow="fold")
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


class _Fitting(Table):
    """A table that a narrow terminal shows without some columns, so that names stay whole."""

    @override
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self
        if options.max_width < _WIDE:
            shown = copy.copy(self)
            shown.columns = [each for each in self.columns if each.header not in _LEFT_OUT]
        yield from Table.__rich_console__(shown, console, options)


def table_of(program: Program) -> CompressionTable:
    """The record of a program, for printing, with what the program stores beside its rows."""
    record = record_of(program.graph_module)
    listed = {name for row in record.rows for name in (row.name, *row.aliases)}
    stored = stored_tensors(program.graph_module)
    rest = [each for name, each in stored.items() if not each.compressed and name not in listed]
    return CompressionTable(
        record.rows,
        record.warnings,
        record.activations,
        rest_bits=sum(each.bits for each in rest),
        rest_elements=sum(each.elements for each in rest),
        program=program,
    )
