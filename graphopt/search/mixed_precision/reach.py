"""Which batches say something about a layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from graphopt.search.mixed_precision.cross_terms import Matrix
from graphopt.search.mixed_precision.layers import Layer
from graphopt.search.mixed_precision.records import Records

__all__ = ["Reach", "columns_of"]


def columns_of(layers: Iterable[Layer]) -> dict[str, slice]:
    """Layer → the columns of its candidates in the vectors of the fast mode."""
    columns, start = {}, 0
    for layer in layers:
        columns[layer.name] = slice(start, start + len(layer.candidates))
        start += len(layer.candidates)
    return columns


@dataclass(frozen=True)
class Reach:
    """What measurements say of layers that some batches, or all gradients, do not reach.

    Attributes:
        records: The measurements.
        batches: Numbers of the batches of which all is known.
    """

    records: Records
    batches: tuple[int, ...]

    @cached_property
    def columns(self) -> dict[str, slice]:
        """Layer → the columns of its candidates in the vectors."""
        return columns_of(self.records.header.layers)

    @cached_property
    def without_gradient(self) -> tuple[str, ...]:
        """Layers of the fast mode whose vectors are 0 in all batches; their values are measured."""
        if self.records.header.mode != "fast":
            return ()
        measured = {layer for _, layer in self.records.values}
        vectors = [self.records.vectors[batch] for batch in self.batches]
        return tuple(
            name
            for name, own in self.columns.items()
            if name in measured and not any(bool(each[:, own].any()) for each in vectors)
        )

    @property
    def missed(self) -> list[str]:
        """Layers that no batch reaches."""
        return [
            name
            for name in self.columns
            if self.batches and all((batch, name) in self.records.missed for batch in self.batches)
        ]

    def is_measured(self, layer: str) -> bool:
        """Whether a layer's values were measured, not predicted."""
        return self.records.header.mode != "fast" or layer in self.without_gradient

    def batches_of(self, layer: str) -> list[int]:
        """The batches that reach a layer; all of them where none does."""
        if self.is_measured(layer):
            reaching = [b for b in self.batches if (b, layer) not in self.records.missed]
        else:
            own = self.columns[layer]
            reaching = [b for b in self.batches if bool(self.records.vectors[b][:, own].any())]
        return reaching or list(self.batches)

    def mean(self, layer: Layer, metric: str) -> dict[str, float]:
        """Candidate → mean of a measured metric over the batches that reach a layer."""
        rows = [self.records.values[batch, layer.name] for batch in self.batches_of(layer.name)]
        return {
            candidate: math.fsum(row[candidate][metric] for row in rows) / len(rows)
            if all(math.isfinite(row[candidate][metric]) for row in rows)
            else float(np.mean([row[candidate][metric] for row in rows]))
            for candidate in layer.candidates
        }

    def vectors(self, layer: str) -> Matrix:
        """Vectors of a layer's candidates from the batches that reach it, [vectors, candidates]."""
        own = [self.records.vectors[batch] for batch in self.batches_of(layer)]
        return np.concatenate(own)[:, self.columns[layer]].astype(np.float64)
