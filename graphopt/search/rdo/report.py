"""RDOReport: what was done to each layer and block, and how the result compares."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from graphopt.files import replaced
from graphopt.report.notebook import ShownAsTable

__all__ = ["BlockReport", "Comparison", "LayerReport", "RDOReport"]


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One weight.

    Attributes:
        name: Its dotted name.
        shape: Its shape.
        candidate: What it has become.
        bits_per_weight: Stored bits, scales and tables included, per element.
        stored_bits: The same in all.
        coded_bits: What an ideal entropy coder would make of it, per element.
        loss: Predicted loss at the model's outputs.
        how: "error feedback", "adaptive rounding", "searched", "rounded" or "kept".
        snr_db: Signal to noise ratio against the exact weight; None for a weight that is kept.
        note: Why something was not done, or "".

    Examples:
        >>> layer = optimized.report.layers[0]
        >>> isinstance(layer, LayerReport), layer.name, layer.shape, layer.how
        (True, '0.weight', (8, 16), 'error feedback')
    """

    name: str
    shape: tuple[int, ...]
    candidate: str
    bits_per_weight: float
    stored_bits: int
    coded_bits: float
    loss: float
    how: str
    snr_db: float | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """One block.

    Attributes:
        number: Its place.
        layers: Names of its layers.
        rounded: Whether adaptive rounding ran.
        accepted: Whether its outcome was kept.
        before: Loss on held-out batches before it, or None.
        after: The same after it.
        changed: Elements that went to another level.
        undecided: Elements that were between two levels when training ended, and were decided then.

    Examples:
        >>> block = optimized.report.blocks[0]
        >>> isinstance(block, BlockReport), block.number, block.rounded
        (True, 0, False)
    """

    number: int
    layers: tuple[str, ...]
    rounded: bool
    accepted: bool = False
    before: float | None = None
    after: float | None = None
    changed: int = 0
    undecided: int = 0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One form of the model against the float one.

    Attributes:
        name: "float", "uniform 8-bit", "uniform 4-bit" or "rate-distortion".
        bits_per_weight: Stored bits of the layers, scales and tables included, per weight.
        ratio: 32-bit size of the layers over the stored one.
        distance: The config's metric between its outputs and the float ones.
        agreement: Share of equal largest outputs, or None where outputs are no classes.
        score: What the caller's evaluation says, or None.
        drop: Score of the float model less this one's.
        error: Standard error of the drop, from the paired scores of the samples.

    Examples:
        >>> rows = optimized.report.comparison
        >>> isinstance(rows[0], Comparison), [row.name for row in rows]
        (True, ['float', 'uniform 8-bit', 'uniform 4-bit', 'rate-distortion'])
    """

    name: str
    bits_per_weight: float
    ratio: float
    distance: float
    agreement: float | None = None
    score: float | None = None
    drop: float | None = None
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class RDOReport(ShownAsTable):
    """What `graphopt.rdo.optimize` has done.

    Attributes:
        versions: Of graphopt and torch.
        fingerprint: Of the exact graph.
        config: As it was used.
        samples: Calibration samples.
        rate_weight: λ of the allocation, loss per bit.
        bits_per_weight: Stored bits of all layers over their weights, scales and tables included.
        coded_bits_per_weight: The same in an ideal entropy coder.
        predicted_loss: Sum of the layers' losses.
        moves: Candidates that changed because of other layers of their block.
        seconds: Wall time of each stage; not in files, which two runs write alike.
        layers: Every weight.
        blocks: Every block.
        metric: Name of the distance.
        comparison: The result, uniform forms and the float model.

    Examples:
        >>> report = optimized.report
        >>> isinstance(report, RDOReport), report.samples, report.metric
        (True, 16, 'kl')
    """

    versions: dict[str, str]
    fingerprint: str
    config: dict[str, Any]
    samples: int
    rate_weight: float
    bits_per_weight: float
    coded_bits_per_weight: float
    predicted_loss: float
    moves: int
    seconds: dict[str, float]
    layers: tuple[LayerReport, ...]
    blocks: tuple[BlockReport, ...]
    metric: str
    comparison: tuple[Comparison, ...] = field(default_factory=tuple)

    def __getitem__(self, name: str) -> Comparison:
        """The row of one form of the model."""
        for row in self.comparison:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def bits(self) -> dict[str, Any]:
        """Layer → candidate and bits."""
        return {
            layer.name: {
                "candidate": layer.candidate,
                "bits_per_weight": layer.bits_per_weight,
                "stored_bits": layer.stored_bits,
            }
            for layer in self.layers
        }

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, without times: equal runs have equal bytes."""
        target = Path(path)
        plain = self.to_dict()
        del plain["seconds"]
        with replaced(target) as temporary:
            temporary.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        return target

    def __rich__(self) -> Group:
        return Group(self._comparison_table(), self._layer_table())

    def _comparison_table(self) -> Table:
        table = Table(title=f"{self.samples} unlabelled calibration samples")
        scored = any(row.score is not None for row in self.comparison)
        shown = any(row.agreement is not None for row in self.comparison)
        headings = ["", *(["score", "drop"] if scored else []), "bits/weight", "ratio", self.metric]
        for heading in [*headings, *(["agreement"] if shown else [])]:
            table.add_column(heading, justify="left" if not heading else "right")
        for row in self.comparison:
            cells = [row.name]
            if scored:
                drop = "" if row.drop is None else f"{row.drop:.2f}"
                if row.error is not None:
                    drop += f" ± {row.error:.2f}"
                cells += ["" if row.score is None else f"{row.score:.2f}", drop]
            cells += [f"{row.bits_per_weight:.3f}", f"{row.ratio:.2f}", f"{row.distance:.3g}"]
            if shown:
                cells.append("" if row.agreement is None else f"{100 * row.agreement:.2f} %")
            table.add_row(*cells)
        return table

    def _layer_table(self) -> Table:
        table = Table(
            title=f"{self.bits_per_weight:.3f} bits per weight, λ {self.rate_weight:.3g},"
            f" predicted loss {self.predicted_loss:.3g}"
        )
        for heading in ("layer", "shape", "candidate", "bits", "loss", "SNR dB", "how"):
            left = heading in ("layer", "candidate", "how")
            table.add_column(heading, justify="left" if left else "right")
        for layer in self.layers:
            table.add_row(
                layer.name,
                "×".join(map(str, layer.shape)),
                layer.candidate,
                f"{layer.bits_per_weight:.2f}",
                f"{layer.loss:.2g}",
                "" if layer.snr_db is None else f"{layer.snr_db:.1f}",
                f"{layer.how}; {layer.note}" if layer.note else layer.how,
            )
        return table
