"""The record of what was done: one row per candidate tensor, done or not and why."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

__all__ = ["ActivationRecord", "CompressionRecord", "TensorRecord", "finite_values", "merged"]


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

    Examples:
        >>> row = graphopt.compress(model, example, {"palettization": {}}).report()["0.weight"]
        >>> row.status, row.n_bits, row.shape
        ('palettized', 4, (8, 16))
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
        why: Which ops ask for the rounding; "" where it is not rounded.
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
    why: str = ""
    scale: float | None = None
    offset: float | None = None
    low: float | None = None
    high: float | None = None
    seen: int = 0


@dataclass(frozen=True)
class CompressionRecord:
    """Rows of `TensorRecord` with totals.

    Attributes:
        rows: One per candidate tensor, in the order of the graph.
        warnings: Config keys that had no effect, and other remarks on the whole model.
        activations: One per scale of activations, and per op that stays in float.
        rest_bits: Bits of the parameters and buffers that have no row: biases, norms, scales of
            activations.
        rest_elements: Their elements.
    """

    rows: tuple[TensorRecord, ...]
    warnings: tuple[str, ...] = ()
    activations: tuple[ActivationRecord, ...] = ()
    rest_bits: int = 0
    rest_elements: int = 0

    def __repr__(self) -> str:
        done = f"{len(self.compressed)} of {len(self.rows)} tensors compressed"
        dense = f"{self.overall_bits_per_weight:.3f} bits per weight"
        return f"{type(self).__name__}({done}, {dense})"

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
        """Bytes of all parameters and buffers in their stored form."""
        return sum(-(-row.stored_bits // 8) for row in self.rows) + -(-self.rest_bits // 8)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element over the compressed rows."""
        done = self.compressed
        return sum(row.stored_bits for row in done) / max(sum(row.numel for row in done), 1)

    @property
    def overall_bits_per_weight(self) -> float:
        """Stored bits per element over all parameters and buffers, what is left alone included."""
        total = sum(row.numel for row in self.rows) + self.rest_elements
        bits = sum(row.stored_bits for row in self.rows) + self.rest_bits
        return bits / max(total, 1)

    def to_json(self) -> str:
        """Rows, activations and remarks as one JSON object."""
        plain = {
            "overall_bits_per_weight": self.overall_bits_per_weight,
            "bits_per_weight": self.bits_per_weight,
            "stored_bytes": self.stored_bytes,
            "tensors": self.to_dicts(),
            "activations": [asdict(record) for record in self.activations],
            "warnings": list(self.warnings),
        }
        # JSON has no infinity
        return json.dumps(finite_values(plain), indent=2, default=str)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Rows as plain values."""
        return [
            {**asdict(row), "numel": row.numel, "bits_per_weight": row.bits_per_weight}
            for row in self.rows
        ]


def merged(first: CompressionRecord, second: CompressionRecord) -> CompressionRecord:
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
    return CompressionRecord(
        (*kept, *added),
        (*first.warnings, *second.warnings),
        (*first.activations, *second.activations),
    )


def finite_values(value: Any) -> Any:
    """Plain values with None for infinite ones, which JSON has not."""
    if isinstance(value, dict):
        return {key: finite_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
