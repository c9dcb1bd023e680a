"""How a CompressionTable is laid out, apart from it since laying out loads rich."""

from __future__ import annotations

import copy
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from typing_extensions import override

from graphopt.ir.records import CompressionRecord

__all__ = ["activations", "weights"]

_WIDE = 110
_LEFT_OUT = ("op", "shape")  # where a line has fewer characters than that
_NUMBERS = ("bits/weight", "KiB", "SNR dB")


def weights(record: CompressionRecord) -> Table:
    """A row for each tensor, and the warnings below."""
    table = _Fitting(title=_title(record))
    for heading in ("tensor", *_LEFT_OUT, *_NUMBERS, "what, or why not"):
        right = heading in _NUMBERS
        side: Literal["left", "right"] = "right" if right else "left"
        table.add_column(heading, justify=side, no_wrap=right, overflow="fold")
    for row in record.rows:
        snr = "" if row.snr_db is None else f"{row.snr_db:.1f}"
        about = f"{row.detail}; {row.note}" if row.note else row.detail
        if row.aliases:
            about += f"; tied with {', '.join(row.aliases)}"
        size = f"{row.stored_bits / 8192:.2f}"
        shape = "×".join(map(str, row.shape))
        bits = f"{row.bits_per_weight:.3f}"
        table.add_row(row.name, ", ".join(row.ops), shape, bits, size, snr, about)
    for warning in record.warnings:
        table.add_row("", "", "", "", "", "", warning)
    return table


def activations(record: CompressionRecord) -> Table:
    """The activations, for printing."""
    table = Table(title="activations")
    for heading in ("values", "type", "range", "scale", "offset", "seen", "why", "decided by"):
        table.add_column(heading, overflow="fold")
    for each in record.activations:
        if each.status == "float":
            table.add_row(each.name, "float", "", "", "", "", each.detail, each.path)
            continue
        known = each.low is not None and each.high is not None
        reach = f"[{each.low:.4g}, {each.high:.4g}]" if known else ""
        scale = "" if each.scale is None else f"{each.scale:.4g}"
        offset = "" if each.offset is None else f"{each.offset:g}"
        values = ", ".join(each.nodes)
        about = (each.detail, reach, scale, offset, str(each.seen))
        table.add_row(values, *about, each.why, each.path)
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


def _title(record: CompressionRecord) -> str:
    done = [
        (len(record.palettized), "palettized"),
        (len(record.quantized), "quantized"),
        (len(record.pruned), "pruned"),
    ]
    parts = [f"{count} {verb}" for count, verb in done if count]
    if len(parts) > 1:
        title = f"{' and '.join(parts)} of {len(record.rows)} tensors"
    else:
        count, verb = next(((c, v) for c, v in done if c), (0, "compressed"))
        title = f"{count} of {len(record.rows)} tensors {verb}"
    scales = sum(each.status == "quantized" for each in record.activations)
    title += f", {scales} activation scales" if scales else ""
    if not record.compressed:
        return title
    overall = f"{record.overall_bits_per_weight:.3f} bits per weight"
    return f"{title}; {overall}, {record.bits_per_weight:.3f} over the compressed"
