"""What algorithms that find tables and codes are given, and what they have found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from graphopt.run.batches import Batch
from graphopt.schemes.palettize import PalettizedWeight

__all__ = ["Evidence", "Palettes"]


@dataclass(frozen=True)
class Evidence:
    """What a calibration has seen.

    Attributes:
        batches: Inputs of one call each, where an algorithm asked for them.
        sensitivities: Name of a weight → mean squared gradient of each element.
        saliency: Name of an op's node → [batch, positions] per batch.
        spread: Name of an embedding's node → second moment of its output's gradient, [rows, rows].
        correct_bias: Whether biases may take up the mean error of their layers.
        seed: Seed of whatever is drawn.
        progress: Show bars; None shows them on a terminal.
    """

    batches: Sequence[Batch] = ()
    sensitivities: Mapping[str, Tensor] = field(default_factory=dict)
    saliency: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    spread: Mapping[str, Tensor] = field(default_factory=dict)
    correct_bias: bool = True
    seed: int = 0
    progress: bool | None = None


@dataclass(frozen=True)
class Palettes:
    """What was found so far.

    Attributes:
        weights: Name of the weight → its stored form.
        biases: Name of the bias → its corrected value.
        remarks: What people should know.
    """

    weights: dict[str, PalettizedWeight] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
