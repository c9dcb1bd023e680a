"""What a page about a program shows, computed once: the record, the difference, what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from graphopt.analysis.stored_values import StoredValue, stored_values
from graphopt.backends import load_backend
from graphopt.backends.registry import targets
from graphopt.errors import LoweringError, MissingDependencyError
from graphopt.ir.annotations import passes_run
from graphopt.ir.program import Program
from graphopt.ir.records import TensorRecord
from graphopt.report.bits import bits_per_weight
from graphopt.report.difference import Difference, LayerDifference, decibels
from graphopt.report.graph_page import graph_data
from graphopt.report.graph_view import view_of
from graphopt.report.names import common_prefix, weight_name
from graphopt.run.interpreter import constant_value
from graphopt.schemes.sizes import padding

__all__ = ["PageContents", "contents_of"]

_BINS = 80
_MOST_HISTOGRAMS, _MOST_ENTRIES = 400, 512


@dataclass(frozen=True)
class PageContents:
    """Plain values of a page, all from one record and one difference.

    Attributes:
        tiles: (what, value, remark) of the whole.
        prefix: What all names of weights begin with; pages leave it out.
        weights: One per weight, in the order of the network.
        activations: One per scale, and per op that stays in float.
        palettes: Weight → its histogram and the entries of its tables.
        passes: (name, milliseconds or None, nodes before, nodes after, changed).
        notes: Remarks on the whole.
        graph: What the viewer reads.
    """

    tiles: tuple[tuple[str, str, str], ...]
    prefix: str
    weights: tuple[dict[str, Any], ...]
    activations: tuple[dict[str, Any], ...]
    palettes: dict[str, dict[str, Any]]
    passes: tuple[tuple[str, float | None, int | None, int | None, bool], ...]
    notes: tuple[str, ...]
    graph: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def contents_of(
    program: Program,
    difference: Difference | None = None,
    before: nn.Module | ExportedProgram | Program | None = None,
    artifact: Any = None,
    predictions: Mapping[str, str] | None = None,
) -> PageContents:
    """All that is known of a program.

    Args:
        program: What the page is about.
        difference: How it differs from the model.
        before: The model, for histograms of its exact weights.
        artifact: What a target made of it, saved, for its size and what was verified.
        predictions: What a search foresaw of the whole, by name.
    """
    weights = _weights(program, difference)
    foreseen = [(name, value, "of the recipe") for name, value in (predictions or {}).items()]
    return PageContents(
        tiles=(*_tiles(program, difference, artifact), *foreseen),
        prefix=common_prefix([row["name"] for row in weights]),
        weights=tuple(weights),
        activations=tuple(asdict(record) for record in program.table.activations),
        palettes=_palettes(program, before),
        passes=_passes(program),
        notes=(*program.table.warnings, *(f"state {state}" for state in program.state)),
        graph=graph_data(view_of(program)),
    )


def kib(bits: float) -> str:
    """A size for people."""
    size = bits / 8
    if size >= 1024**2:
        return f"{size / 1024**2:,.2f} MiB"
    return f"{size / 1024:,.1f} KiB"


def _tiles(
    program: Program, difference: Difference | None, artifact: Any
) -> list[tuple[str, str, str]]:
    table, counted = program.table, bits_per_weight(program)
    tiles = []
    if artifact is not None and artifact.path is not None:
        tiles.append(("file", kib(8 * artifact.size), f"{artifact.path.name}, as saved"))
    tiles.append(("all tensors", kib(counted.total_bits), f"{counted.total_weights:,} elements"))
    for name, bits in _sizes_on_targets(program, counted.total_bits):
        tiles.append((f"tensors on {name}", kib(bits), "codes as wide as the target stores them"))
    tiles.append(("bits per element", f"{counted.bpw:.3f}", "over all parameters and buffers"))
    if table.compressed:
        count = f"{len(table.compressed)} of {len(table)} tensors compressed"
        tiles.append(("bits per compressed weight", f"{table.bits_per_weight:.3f}", count))
        errors = [row.snr_db for row in table.compressed if row.snr_db is not None]
        if errors:
            worst = min(
                table.compressed, key=lambda row: math.inf if row.snr_db is None else row.snr_db
            )
            tiles.append(("worst weight", f"{min(errors):.1f} dB", worst.name))
    if difference is not None:
        was = sum(layer.bytes_before for layer in difference)
        now = max(1, sum(layer.bytes_after for layer in difference))
        tiles.append(("weights", f"{was / now:.2f}× smaller", f"{kib(8 * was)} → {kib(8 * now)}"))
        if difference.output_sqnr:
            shown = ", ".join(decibels(value) for value in difference.output_sqnr)
            tiles.append(("measured, outputs", f"{shown} dB", "signal to error, on the data given"))
    outcome = None if artifact is None else artifact.verification
    if outcome is not None and outcome.complete:
        tiles.append(("artifact against PyTorch", f"{outcome.max_error:.1e}", outcome.how))
    report = getattr(program, "pass_report", None)
    if report is not None:
        tiles.append(("time", f"{report.seconds:.1f} s", f"in {len(report)} passes"))
    return tiles


def _sizes_on_targets(program: Program, total: int) -> list[tuple[str, int]]:
    """Targets that store codes in another width, and what all tensors take there."""
    values = [value for value in stored_values(program.graph_module) if value.codes is not None]
    found = []
    for target in targets():
        try:
            rules = load_backend(target).capabilities.storage
        except (MissingDependencyError, LoweringError):
            continue
        added = [pair[1] for value in values if (pair := padding(value, rules)) is not None]
        if added:
            found.append((str(target), total + sum(added)))
    return found


def _weights(program: Program, difference: Difference | None) -> list[dict[str, Any]]:
    layers: dict[str, list[LayerDifference]] = {}
    for layer in difference or ():
        layers.setdefault(layer.name, []).append(layer)
    rows = [_row(record, layers.pop(record.name, [])) for record in program.table]
    # a program without a record is told by what its graph stores
    rows += [_unrecorded(name, each) for name, each in layers.items()]
    order = {layer.name: place for place, layer in enumerate(difference or ())}
    last = len(order)
    return (
        sorted(rows, key=lambda row: order.get(row["name"], last))
        if not len(program.table)
        else rows
    )


def _row(record: TensorRecord, layers: Sequence[LayerDifference]) -> dict[str, Any]:
    width = (
        torch.empty((), dtype=getattr(torch, record.dtype)).element_size() if record.dtype else 4
    )
    tied = f"tied with {', '.join(record.aliases)}" if record.aliases else ""
    return {
        "name": record.name,
        "op": ", ".join(record.ops),
        "shape": "×".join(map(str, record.shape)),
        "status": record.status,
        "bits": record.bits_per_weight,
        "tables": record.n_luts,
        "before": record.numel * width,
        "after": record.stored_bits / 8,
        "weight_db": record.snr_db,
        **_errors(layers),
        "why": "; ".join(filter(None, (record.detail, record.note, tied))),
    }


def _unrecorded(name: str, layers: Sequence[LayerDifference]) -> dict[str, Any]:
    layer = layers[0]
    return {
        "name": name,
        "op": layer.op_type,
        "shape": "×".join(map(str, layer.shape)),
        "status": "compressed" if layer.bytes_after < layer.bytes_before else "as before",
        "bits": layer.bits,
        "tables": layer.tables or None,
        "before": layer.bytes_before,
        "after": layer.bytes_after,
        "weight_db": layer.weight_sqnr,
        **_errors(layers),
        "why": layer.dtype,
    }


def _errors(layers: Sequence[LayerDifference]) -> dict[str, float | None]:
    """Of a tied weight those of the op that loses most."""
    own = [layer.own_sqnr for layer in layers if layer.own_sqnr is not None]
    output = [layer.output_sqnr for layer in layers if layer.output_sqnr is not None]
    return {"own_db": min(own, default=None), "output_db": min(output, default=None)}


def _passes(
    program: Program,
) -> tuple[tuple[str, float | None, int | None, int | None, bool], ...]:
    report = getattr(program, "pass_report", None)
    if report is None:
        return tuple((name, None, None, None, True) for name in passes_run(program.graph_module))
    return tuple(
        (each.name, 1e3 * each.seconds, each.nodes_before, each.nodes_after, each.modified)
        for each in report
    )


def _palettes(program: Program, before: Any) -> dict[str, dict[str, Any]]:
    """Histograms of the exact weights where these are known, with the entries of their tables."""
    values = [value for value in stored_values(program.graph_module) if not value.nested]
    values.sort(key=lambda value: -math.prod(value.shape))
    originals = _originals(before)
    return {
        weight_name(value.name): _histogram(program, value, originals)
        for value in values[:_MOST_HISTOGRAMS]
    }


def _histogram(
    program: Program, value: StoredValue, originals: dict[str, Tensor]
) -> dict[str, Any]:
    gm = program.graph_module
    with torch.no_grad():
        dense = constant_value(gm, value.dense).float()
    exact = originals.get(weight_name(value.name))
    shown = dense if exact is None else exact.float()
    low, high = float(shown.min()), float(shown.max())
    if low == high:
        low, high = low - 1, high + 1
    entries: list[float] = []
    if value.entry_node is not None:
        entries = constant_value(gm, value.entry_node).float().unique()[:_MOST_ENTRIES].tolist()
    return {
        "low": low,
        "high": high,
        "counts": torch.histc(shown.reshape(-1), _BINS, low, high).long().tolist(),
        "entries": entries,
        "label": value.label,
        "exact": exact is not None,
    }


def _originals(before: Any) -> dict[str, Tensor]:
    if before is None:
        return {}
    module = before.graph_module if isinstance(before, Program) else before
    if isinstance(module, ExportedProgram):
        module = module.module()
    return {name: parameter.detach() for name, parameter in module.named_parameters()}
